/*
 * Open but unlinked: no inode is freed while a mount holds it open.
 *
 * Two announcements face each other, and of two that run at once one sees the other:
 *  - an opener lists the inode in its slot, fences, looks whether anybody intends to free it (then
 *    it moves the commit sequence on, so that a freeing planned before fails and is planned again
 *    under its entry), and then looks whether the inode still exists;
 *  - who frees it loads the commit word, announces the intent in its slot, fences, looks at all
 *    lists, and commits: without entries the inode goes, with its last link if that is how it
 *    came to this; with entries it stays as an orphan, and whoever closes it tries again.
 *
 * A store goes through the storing peer's buffer: it is seen by others when `memory` lets it out,
 * while its owner goes on; a fence and the compare-and-swap of the commit word wait for that.  So
 * x86 behaves with plain stores; a compare-and-swap on ARM64, whose store may become visible after
 * later loads, is no stronger.
 *
 * Abstractions, and why each is sound:
 *  - One inode, one entry per peer: words of different inodes never meet, and where several share
 *    a bit of the open filter, the bit being set for another one only delays a freeing.
 *  - The commit word carries the state of that inode; that a commit happens wholly or not at all
 *    is commit.pml's.
 *  - A buffer holds one store: a peer's stores become visible in order, and it stores to its two
 *    words in turns, with a fence or swap between an announcement and what depends on it.
 *  - Slots stay with their owners; slots that change hands are slots.pml's.
 */

#ifndef PEERS
#define PEERS 3
#endif
#ifndef OPENS
#define OPENS 1         /* per peer */
#endif
#ifndef UNLINKS
#define UNLINKS 2       /* in all */
#endif
#ifndef RELINKS
#define RELINKS 1       /* in all: linkat() of an open inode gives it a name again */
#endif

#define ABSENT 0        /* not created yet, or freed */
#define LINKED 1
#define ORPHAN 2        /* without links, not freed */

byte W = ABSENT;        /* commit word: sequence * 4 + state of the inode */
#define NEXT_W(w, state) (((w) / 4 + 1) * 4 + (state))

/* In the region, one word each per slot, stored to by its owner: */
bool list[PEERS + 1];   /* it may hold the inode open */
bool intent[PEERS + 1]; /* it is about to free the inode */

/* A store on its way: 0 none, else 1 + value to list[me] or 3 + value to intent[me]. */
byte buffer[PEERS + 1];

/* For the assertions. */
bool in_use[PEERS + 1]; /* a successful open that was not closed */
bool freed;             /* the inode came and went: its number is not used again */
byte over;
byte unlinks = UNLINKS, relinks = RELINKS;

#define FENCE (buffer[me] == 0)
/* Without a fence behind it, a store waits in the buffer and its owner goes on. */
#define STORE_LIST(value)           atomic { FENCE -> buffer[me] = 1 + value }
#define STORE_INTENT(value)         atomic { FENCE -> buffer[me] = 3 + value }
/* With one its owner does nothing until it is out: one step. */
#define STORE_LIST_FENCED(value)    atomic { FENCE -> list[me] = value }
#define STORE_INTENT_FENCED(value)  atomic { FENCE -> intent[me] = value }

active proctype memory() {
    byte k;

end:
    do
    :: atomic {
            if
            :: buffer[1] != 0 -> k = 1
            :: buffer[2] != 0 -> k = 2
#if PEERS > 2
            :: buffer[3] != 0 -> k = 3
#endif
            fi;
            if
            :: buffer[k] < 3 -> list[k] = buffer[k] - 1
            :: buffer[k] >= 3 -> intent[k] = buffer[k] - 3
            fi;
            buffer[k] = 0;
            k = 0
        }
    od
}

/* Looks at the lists of all others; goes on at `listed` when one has an entry. */
#define SCAN_LISTS \
    k = 1; \
    do \
    :: atomic { k <= PEERS && (k == me || !list[k]) -> k++ } \
    :: atomic { k <= PEERS && k != me && list[k] -> k = PEERS + 2; break } \
    :: atomic { k > PEERS -> break } \
    od

inline check_unused() {
    assert(!in_use[1] && !in_use[2]);                               /* M7 */
#if PEERS > 2
    assert(!in_use[3]);                                             /* M7 */
#endif
    freed = true
}

/*
 * A transaction that takes the last link (from == LINKED) or frees an orphan (from == ORPHAN).
 * It goes on behind itself when the inode is in another state or the transaction is done.
 */
inline remove(from) {
#ifdef BREAK_SCAN_FIRST                 /* before the root that the freeing is planned on */
    STORE_INTENT_FENCED(1);
    SCAN_LISTS;
#endif
    do
    :: atomic { w = W;
            if
            :: w % 4 != from -> break
            :: else
            fi
        };
#ifndef BREAK_SCAN_FIRST
#if defined(BREAK_INTENT_UNFENCED)
        STORE_INTENT(1);
#elif !defined(BREAK_NO_INTENT) && !defined(BREAK_INTENT_AFTER_SCAN)
        STORE_INTENT_FENCED(1);
#endif
#ifdef BREAK_NO_SCAN
        k = PEERS + 1;
#else
        SCAN_LISTS;
#endif
#ifdef BREAK_INTENT_AFTER_SCAN
        STORE_INTENT_FENCED(1);
#endif
#endif
#ifdef BREAK_WITHDRAW_EARLY
        STORE_INTENT_FENCED(0);
#endif
        atomic { FENCE ->               /* the commit */
            if
            :: W == w && k == PEERS + 1 && !own ->
                W = NEXT_W(w, ABSENT); check_unused(); break
            :: W == w && (k == PEERS + 2 || own) ->
                W = NEXT_W(w, ORPHAN); break
            :: W != w ->                /* plan again */
#ifdef BREAK_NO_RESCAN
                w = W;                  /* but not with another look at the lists */
                if
                :: w % 4 == from && k == PEERS + 1 && !own ->
                    W = NEXT_W(w, ABSENT); check_unused(); break
                :: else
                fi
#endif
            fi
        }
    od;
    atomic { w = 0; k = 0; FENCE -> intent[me] = false }        /* withdrawn */
}

proctype peer(byte me) {
    byte w, k;
    byte opens = OPENS;
    bool own;                           /* held open here */

idle:
    do
    :: atomic { opens > 0 && W % 4 == ABSENT && !freed -> opens--; w = W; goto create }
    :: atomic { opens > 0 && W % 4 != ABSENT -> opens--; goto open }
    :: atomic { opens > 0 && freed -> opens = 0 }               /* nothing left to open */
    :: atomic { unlinks > 0 && W % 4 == LINKED -> unlinks--; goto unlink }
    :: atomic { opens == 0 -> break }
    od;
    goto finished;

unlink:
    remove(LINKED);
    goto idle;

create:
#ifndef BREAK_CREATE_LISTS_LATER
    STORE_LIST_FENCED(1);
#endif
    atomic { FENCE ->
        if
        :: W == w && !freed -> W = NEXT_W(w, LINKED); w = 0; in_use[me] = true; own = true
        :: else -> w = 0; goto unlist   /* somebody else was faster */
        fi
    };
#ifdef BREAK_CREATE_LISTS_LATER
    STORE_LIST_FENCED(1);
#endif
    goto opened;

open:                                   /* it was looked up before: linked, or by its number */
#ifdef BREAK_LIST_LAST
    goto look;
list_last:
#endif
#ifdef BREAK_LIST_UNFENCED
    STORE_LIST(1);
#else
    STORE_LIST_FENCED(1);
#endif
#ifdef BREAK_LIST_LAST
    in_use[me] = true; own = true; goto opened;
look:
#endif
#ifdef BREAK_LOOK_BEFORE_INTENTS
    atomic { if :: W % 4 == ABSENT -> goto unlist :: else fi };
#endif
#ifndef BREAK_INTENTS_IGNORED
    k = 1;
    do
    :: atomic { k <= PEERS && (k == me || !intent[k]) -> k++ }
    :: atomic { k <= PEERS && k != me && intent[k] -> k = 0;
#ifdef BREAK_OPEN_WITHOUT_FENCE
            goto moved_on
#else
            break
#endif
        }
    :: atomic { k > PEERS -> k = 0; goto moved_on }
    od;
move_on:
    w = W;
    atomic { FENCE ->
        if
        :: W == w -> W = NEXT_W(w, w % 4); w = 0
        :: else -> w = 0; goto move_on
        fi
    };
moved_on:
#endif
    atomic {                            /* does it still exist? */
        if
#ifndef BREAK_LOOK_BEFORE_INTENTS
        :: W % 4 == ABSENT -> goto unlist
#endif
        :: else ->
#ifdef BREAK_LIST_LAST
            goto list_last
#else
            in_use[me] = true; own = true
#endif
        fi
    };

opened:
    do
    :: atomic { relinks > 0 && W % 4 == ORPHAN -> w = W; relinks-- };
        atomic { FENCE ->
            if
            :: W == w -> W = NEXT_W(w, LINKED)
            :: else -> relinks++
            fi;
            w = 0
        }
    :: atomic { unlinks > 0 && W % 4 == LINKED -> unlinks--; goto unlink_own }
    :: atomic {                         /* close */
            assert(W % 4 != ABSENT);                                /* M7 */
            in_use[me] = false; own = false;
            goto unlist
        }
    od;

unlink_own:
    remove(LINKED);
    goto opened;

unlist:
    STORE_LIST_FENCED(0);
    remove(ORPHAN);
    goto idle;

finished:
    /*
     * A tick later.  Needed: a closer that saw the inode linked and an unlinker that saw it listed
     * may both leave it to the other.
     */
#ifndef BREAK_NO_TICK
    remove(ORPHAN);
#endif
    over++
}

init {
    atomic {
        run peer(1);
        run peer(2);
#if PEERS > 2
        run peer(3);
#endif
    };
    atomic {
        over == PEERS && buffer[1] == 0 && buffer[2] == 0 && buffer[PEERS] == 0 ->
        /* nobody has it open: nobody forgot to free it */
        assert(W % 4 != ORPHAN)                                     /* M6 */
    }
}
