/*
 * A peer slot that changes hands while its former owner sleeps.
 *
 * A slot is more than its state word: it names its owner (so that others can see that the owner
 * is surely gone), lists the inodes held open, and announces the inode about to be freed.  An owner
 * that slept while its slot was taken over may be about to store to any of these.  What keeps the
 * new owner whole: every word of the list, and the intent, bears the incarnation and changes by
 * compare-and-swap only; the identity bears the incarnation that it was written for; whoever judges
 * a slot does so on one value of its state word.
 *
 * There is one slot and there are two peers that want it: a peer that finds it taken away takes it
 * back, over whoever is IDLE (or still JOINING) in it.  Every process is a zombie before each of
 * its accesses; `gone` peers take no further step.  With -DFREERS the peers free the inode, and
 * somebody in another slot opens it; without, they open it, and somebody else frees it.
 *
 * Abstractions, and why each is sound:
 *  - One slot: slots share no words.  One inode and one word of the list, for the same reason.
 *  - A transaction is the swap of the commit word by which the inode is freed; the rest is
 *    commit.pml's.  How lists and intents face each other is openlist.pml's.  Here are the steps
 *    of it that touch the slot; where the freer's slot is not looked at, its announcement is a
 *    commit that takes the last link, and an opener opens nothing without links.
 *  - The identity is one word.  In the region it is several, with a checksum over them and the
 *    incarnation: a mixture of two reads as "unknown", like one of another incarnation.
 *  - No store buffers: all words but the identity change by compare-and-swap and a fence follows,
 *    and the identity is only believed when its incarnation fits.
 *  - No counter in the state word: beginning and ending transactions in vain would only make
 *    other peers' swaps of that word fail more often.
 */

#ifndef JOINS
#define JOINS 3         /* in all */
#endif
#ifndef OPENS
#define OPENS 2         /* in all */
#endif
#ifndef DEATHS
#define DEATHS 1
#endif
#ifndef JUDGEMENTS
#define JUDGEMENTS 1
#endif

#define FREE    0
#define JOINING 1
#define IDLE    2
#define ACTIVE  3

#define ABSENT 0
#define LINKED 1
#define ORPHAN 2

typedef Word { byte what, inc };    /* one 64-bit word: always read and changed as a whole */
Word state;                         /* FREE ... ACTIVE */
Word word;                          /* 1: the inode is listed (with FREERS: is about to be freed) */
Word who;                           /* number of the peer */

byte W = LINKED;                    /* commit word: sequence * 4 + state of the inode */
#define NEXT_W(w, s) (((w) / 4 + 1) * 4 + (s))

/* For the assertions. */
bool gone[3];
bool in_use[3];                     /* a successful open that was not closed ... */
byte in_use_inc[3];                 /* ... under this incarnation */
byte owner;                         /* peer that last joined */
byte joins = JOINS, opens = OPENS, deaths = DEATHS;
bool other_lists, other_in_use;     /* somebody in another slot */

/* CAS of our word of the slot: (inc, old) -> (inc, new). */
inline set_word(old, new) {
    atomic {
        if
#if defined(BREAK_WORD_BY_STORE)
        :: true -> word.what = new; word.inc = inc
#elif defined(BREAK_WORD_UNSTAMPED)
        :: word.what == old -> word.what = new; word.inc = state.inc
        :: else -> goto lost
#else
        :: word.what == old && word.inc == inc -> word.what = new
        :: else -> goto lost
#endif
        fi
    }
}

/* The state word: it must be ours, in state `from`. */
#define MINE(from) (state.what == from && state.inc == inc)

/*
 * An opener, having listed, sees that the slot is still its own: what it stored, or had stored
 * before, may be in the hands of a newcomer that has not emptied the list yet.
 */
inline still_mine() {
#ifndef BREAK_LISTED_UNCHECKED
    atomic { if :: MINE(IDLE) :: else -> goto lost fi }
#else
    skip
#endif
}

proctype peer(byte me) provided (!gone[me]) {
    byte inc, seen_what, seen_inc, w;
    bool late;                      /* for the assertions: this call began with the slot lost */

join:
    atomic {                        /* take the slot from whoever sleeps in it */
        in_use[me] = false; in_use_inc[me] = 0; late = false; w = 0; inc = 0;
        if
        :: joins > 0 && state.what != ACTIVE ->
            joins--;
            inc = state.inc + 1;
            state.what = JOINING;
            state.inc = inc;
            owner = me
        :: else -> goto finished
        fi
    };
    atomic { who.what = me; who.inc = inc };
    do                              /* empty the word for this incarnation, unless it is newer */
    :: atomic {
            seen_what = word.what; seen_inc = word.inc;
            if
#ifndef BREAK_WORD_UNSTAMPED
            :: seen_inc > inc -> goto lost
#endif
            :: !MINE(JOINING) -> goto lost
            :: else
            fi
        };
        atomic {
            if
#if defined(BREAK_CLEAR_BY_STORE)
            :: true ->
#elif defined(BREAK_WORD_UNSTAMPED)
            :: word.what == seen_what ->
#else
            :: word.what == seen_what && word.inc == seen_inc ->
#endif
                word.what = 0; word.inc = inc; break
            :: else
            fi
        }
    od;
    atomic {
        seen_what = 0; seen_inc = 0;
        if
        :: MINE(JOINING) -> state.what = IDLE
        :: else -> goto lost
        fi
    };

#ifdef FREERS
idle:
    atomic {
        if
        :: MINE(IDLE) -> state.what = ACTIVE
        :: else -> goto lost
        fi
    };
    w = W;
    if
    :: w % 4 == ABSENT -> goto end_transaction
    :: else
    fi;
    set_word(0, 1);                 /* announce */
    if
    :: atomic { other_lists -> goto end_transaction }       /* it becomes an orphan */
    :: atomic { !other_lists }
    :: goto end_transaction                                 /* gives up: others are faster */
    fi;
    atomic {
        if
        :: W == w -> W = NEXT_W(w, ABSENT); assert(!other_in_use)   /* M7 */
        :: else
        fi
    };
end_transaction:
    atomic {
        w = 0;
        if
        :: MINE(ACTIVE) -> state.what = IDLE
        :: else -> goto lost
        fi
    };
    set_word(1, 0);                 /* withdraw: late, so it may come after a take-over */
    goto join;
#else
    do
    :: atomic { opens > 0 -> opens--; late = (state.inc != inc) };
        set_word(0, 1);
        still_mine();
        atomic {                    /* look again */
            if
            :: W % 4 == LINKED ->
                assert(!late);                                      /* M7 */
                in_use[me] = true; in_use_inc[me] = inc
            :: else
            fi
        };
        if                          /* another open while it is listed already */
        :: atomic { opens > 0 && in_use[me] -> opens--; late = (state.inc != inc) };
            still_mine();
            atomic { if :: W % 4 == LINKED -> assert(!late) :: else fi }    /* M7 */
        :: true
        fi;
        atomic { late = false; in_use[me] = false; in_use_inc[me] = 0 };    /* close */
        set_word(1, 0)
    :: atomic {                     /* a transaction */
            if
            :: MINE(IDLE) -> state.what = ACTIVE
            :: else -> goto lost
            fi
        };
        atomic {
            if
            :: MINE(ACTIVE) -> state.what = IDLE; goto finished
            :: else -> goto lost
            fi
        }
    od;
#endif

lost:
    atomic { seen_what = 0; seen_inc = 0; goto join };

finished:
    skip
}

#ifdef FREERS
/* Opens the inode; its own slot stays its own. */
proctype opener() {
    byte w;

    other_lists = true;
    if
    :: atomic { word.what == 0 -> goto look }
    :: atomic { word.what != 0 }
    fi;
move_on:
    w = W;
    atomic { if :: W == w -> W = NEXT_W(w, w % 4) :: else -> goto move_on fi };
look:
    atomic {
        if
        :: W % 4 == LINKED -> other_in_use = true
        :: else
        fi
    }
}
#else
/* Takes the inode's last link and frees it, as in openlist.pml; from another slot. */
proctype freer() {
    byte w, st, st_inc;

    W = NEXT_W(W, ORPHAN);
    w = W;
    atomic { st = state.what; st_inc = state.inc };
    atomic {
        if
        :: st >= IDLE && word.inc == st_inc && word.what == 1 -> goto leave_it
        :: else
        fi
    };
    atomic {
        if
        :: W == w ->
            W = NEXT_W(w, ABSENT);
            assert(!(in_use[1] && !gone[1] && in_use_inc[1] == state.inc));   /* M7 */
            assert(!(in_use[2] && !gone[2] && in_use_inc[2] == state.inc))    /* M7 */
        :: else
        fi
    };
leave_it:
    skip
}
#endif

#if JUDGEMENTS > 0
/* Sees whether the owner of the slot is surely gone, and says so. */
proctype judge() {
    byte st, st_inc, id, id_inc;
    byte n = JUDGEMENTS;

    do
    :: n > 0 ->
        n--;
        atomic { st = state.what; st_inc = state.inc };
        atomic { id = who.what; id_inc = who.inc };
        atomic {
            if
#ifdef BREAK_IDENTITY_UNSTAMPED
            :: id != 0 && gone[id]
#else
            :: id != 0 && gone[id] && id_inc == st_inc
#endif
            :: else -> st = FREE    /* alive, or not known */
            fi
        };
        atomic {
            if
#ifdef BREAK_JUDGE_ANY_INCARNATION
            :: st != FREE && state.what == st ->
#else
            :: st != FREE && state.what == st && state.inc == st_inc ->
#endif
                assert(gone[owner]);                                /* M9 */
                state.what = FREE
            :: else
            fi;
            st = 0; st_inc = 0; id = 0; id_inc = 0
        }
    :: n == 0 -> break
    od
}
#endif

#if DEATHS > 0
active proctype reaper() {
end:
    do
    :: atomic { deaths > 0 -> deaths--;
            if
            :: gone[1] = true
            :: gone[2] = true
            fi
        }
    od
}
#endif

init {
    atomic {
        run peer(1);
        run peer(2);
#ifdef FREERS
        run opener();
#else
        run freer();
#endif
#if JUDGEMENTS > 0
        run judge()
#endif
    }
}
