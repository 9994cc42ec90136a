/*
 * Bells: a waiter that sleeps is rung by a commit, or has seen it.
 *
 * Two looks face each other, and of two that run at once one sees the other:
 *  - a waiter announces itself in the bell word (compare-and-swap), and then loads the commit word
 *    again before it sleeps;
 *  - a peer that commits swaps the commit word, and then loads the bell word; it swaps that to 0
 *    and rings what it took.
 *
 * Abstractions, and why each is sound:
 *  - The commit word is a counter: what a commit changes is commit.pml's.
 *  - One bell word with a lane for each waiter: a full word sends a waiter to the next one, which
 *    is the same again.  Two waiters behind one number (SHARED) have one lane.
 *  - A ring is a flag that its waiter alone clears, as an eventfd and the count of a uio node are.
 *  - Swaps are full fences, so no store waits in a buffer.
 *  - Peers that die before they ring, and servers that end, are left out: they lose rings, and
 *    the longest sleep bounds the delay.  So a waiter here sleeps without limit.
 */

#ifndef COMMITS
#define COMMITS 3       /* in all */
#endif
#define COMMITTERS 2
#define WAITERS 2

byte W;                 /* commit word */
byte bell;              /* bell word: a bit for each number */
bool rung[WAITERS];     /* what wakes the waiter */
byte seen[WAITERS];     /* the commit word that it knows */
byte commits = COMMITS, over;

#ifdef SHARED
#define LANE(me) 1      /* both processes wait on the device of one machine */
#else
#define LANE(me) (1 << (me))
#endif

proctype committer() {
    byte b;

    do
    :: atomic { commits > 0 -> commits--;
#ifdef BREAK_BELL_BEFORE_COMMIT
            b = bell };
        atomic {
#endif
            W++ };
#ifndef BREAK_BELL_BEFORE_COMMIT
        b = bell;
#endif
again:
        if
        :: b == 0
        :: else ->
#ifdef BREAK_TAKE_BY_STORE
            bell = 0;
#else
            atomic {                    /* take the word, unless it has changed */
                if
                :: bell == b -> bell = 0
                :: bell != b -> b = bell; goto again
                fi
            };
#endif
#ifdef SHARED
            atomic { rung[0] = true; rung[1] = true }   /* one interrupt wakes both */
#else
            if
            :: b & 1 -> rung[0] = true
            :: else
            fi;
            if
            :: b & 2 -> rung[1] = true
            :: else
            fi
#endif
        fi
    :: commits == 0 -> break
    od;
    over++
}

proctype waiter(byte me) {
    byte b;

    do
    ::
#ifndef BREAK_FORGET_LAST
        rung[me] = false;               /* forget the rings so far */
#endif
        seen[me] = W;                   /* look */
#ifdef BREAK_ANNOUNCE_BY_STORE
        b = bell;
        bell = b | LANE(me);
#else
        do                              /* announce */
        :: b = bell;
            if
            :: b & LANE(me) -> break
            :: else
            fi;
            atomic {
                if
                :: bell == b -> bell = b | LANE(me); break
                :: bell != b
                fi
            }
        od;
#endif
#ifdef BREAK_FORGET_LAST
        rung[me] = false;
#endif
#ifndef BREAK_NO_SECOND_LOOK
        if                              /* look again */
        :: W == seen[me] ->
#endif
end_asleep:
            rung[me]                    /* sleep */
#ifndef BREAK_NO_SECOND_LOOK
        :: else
        fi
#endif
    od
}

init {
    atomic {
        run committer();
        run committer();
        run waiter(0);
        run waiter(1);
    };
    over == COMMITTERS;
    timeout;                            /* all that can move has moved: the waiters sleep */
    assert(seen[0] == W && seen[1] == W)                            /* M10 */
}
