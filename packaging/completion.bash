# Completion of ivshmemfs, mkfs.ivshmemfs and fsck.ivshmemfs for bash.
#
# The commands complete by themselves.  Bash splits words at ":" and "=", which names of regions
# contain.  So the command gets the line, and what it offers loses the part before the last of them.

_ivshmemfs_complete() {
    local line=${COMP_LINE:0:COMP_POINT} variable=${1//[.-]/_} word kind text
    word=${line##*[[:space:]]}
    local before=${word%"${word##*[:=]}"}
    [[ $line == *[[:space:]] ]] && line+="''"
    COMPREPLY=()
    while IFS=, read -r kind text; do
        case $kind in
        dir) compopt -o dirnames ;;
        file) compopt -o default ;;
        plain)
            [[ $text == *[/=] ]] && compopt -o nospace
            text=${text#"$before"}
            COMPREPLY+=("$(printf '%q' "$text")")
            ;;
        esac
    done < <(env "_${variable^^}_COMPLETE=bash_complete" COMP_WORDS="$line" COMP_CWORD=-1 "$1" 2>/dev/null)
}

complete -F _ivshmemfs_complete ivshmemfs mkfs.ivshmemfs fsck.ivshmemfs
