/*
 * Two owners of one identity: a machine was cloned, and both copies run on.
 *
 * Both know the same state word and the same nonce of their slot.  A judge under the kernel of the
 * first sees whether the first's process exists; of the second, which looks the same, it cannot
 * know.  It must not declare the slot's owner gone while the second has claims under way in it.
 *
 * What is assumed, and stated as the limit of what can be noticed: the machine was copied between
 * two transactions, and the first completes one step of its own (a beat, a transaction, leaving)
 * after that before its process ends.
 *
 * Abstractions, and why each is sound:
 *  - The counter of the state word is a version: everything that an owner stores to the word is a
 *    new value, and each of the two remembers what it stored last.
 *  - A nonce is a version as well; MARK is the one that says that there are two owners.
 *  - The judge takes everybody for silent: silence can only keep it from judging.
 *  - Who noticed the other leaves for another slot under an identity that proves nothing; what it
 *    does there concerns nobody here.
 *  - No store buffers: all stores are compare-and-swaps, which are fences.
 */

#ifndef STEPS
#define STEPS 2         /* of each owner, at most */
#endif

#define FREE   0
#define IDLE   2
#define ACTIVE 3
#define MARK   255

byte what = IDLE;       /* the state word: state ... */
byte version = 0;       /* ... and counter */
byte nonce = 0;
byte last_nonce = 0;    /* for drawing new ones */

/* For the assertions. */
bool gone[2];           /* its process ended: only the first's ever does */
bool shown = false;    /* the first completed a step since the copy */
bool working = false;   /* the second has claims under way in the slot */

#define MINE(state) (what == state && version == mine)

/* CAS of the nonce, from what this owner stored last. */
inline sign() {
    atomic {
        if
        :: nonce == my_nonce -> last_nonce++; nonce = last_nonce; my_nonce = nonce
        :: else -> goto lost
        fi
    }
}

#define FIRST (me == 0)

proctype owner(byte me) provided (!gone[me]) {
    byte mine = 0, my_nonce = 0, seen;
    byte steps = STEPS;

    do
    :: steps > 0 -> steps--;
        if
        :: true ->                          /* a beat */
#ifdef BREAK_STATE_BEFORE_NONCE
            atomic { if :: MINE(IDLE) :: else -> goto lost fi };
            sign();
#else
            sign();
            atomic { if :: MINE(IDLE) :: else -> goto lost fi };
#endif
            atomic { shown = shown || FIRST }
        :: true ->                          /* a transaction */
#ifdef BREAK_NONCE_BEFORE_BEGIN
            atomic { if :: nonce == my_nonce :: else -> goto lost fi };
#endif
            atomic {
                if
                :: MINE(IDLE) -> what = ACTIVE; version++; mine = version
                :: else -> goto lost
                fi
            };
#if !defined(BREAK_NONCE_BEFORE_BEGIN) && !defined(BREAK_BEGIN_IGNORES_NONCE)
            atomic {
                if
                :: nonce == my_nonce
                :: else ->                  /* nothing is claimed yet */
                    if
                    :: MINE(ACTIVE) -> what = IDLE
                    :: else
                    fi;
                    goto lost
                fi
            };
#endif
            atomic { working = working || !FIRST };
            atomic {
                working = working && FIRST;
                if
                :: MINE(ACTIVE) -> what = IDLE; shown = shown || FIRST
                :: else -> goto lost
                fi
            }
        :: true -> break                    /* leaves */
        fi
    :: steps == 0 -> break
    od;
#ifndef BREAK_LEAVE_UNSIGNED
    sign();
#endif
    atomic {
        if
        :: MINE(IDLE) -> what = FREE; shown = shown || FIRST; goto finished
        :: else -> goto lost
        fi
    };

lost:                                       /* only a twin, or the judge, stores to our words */
    /* Else it would join again under an identity by which others judge it. */
    assert(version != mine || nonce != my_nonce);                           /* M9 */
#ifdef BREAK_MARK_ONCE
    seen = nonce;
    atomic { if :: nonce == seen -> nonce = MARK :: else fi };
#elif !defined(BREAK_NO_MARK)
    do                                      /* the other may show life meanwhile */
    :: seen = nonce;
        atomic { if :: nonce == seen -> nonce = MARK; break :: else fi }
    od;
#endif
    atomic { shown = shown || FIRST; seen = 0 };

finished:
    atomic { mine = 0; my_nonce = 0; steps = 0; if :: FIRST -> shown = true :: else fi }
}

/* The end of the first's process, by a signal or because it has nothing more to do. */
active proctype reaper() {
    atomic { shown -> gone[0] = true }
}

/* Anybody under the first's kernel. */
active proctype judge() {
    byte st, ver, seen;
    byte judgements = 2;

    do
    :: judgements > 0 ->
        judgements--;
        atomic { st = what; ver = version };
#ifdef BREAK_MARK_BEFORE_PROCESS
        atomic { seen = nonce };
#endif
        if
        :: atomic { gone[0] && st != FREE }
        :: atomic { !gone[0] || st == FREE -> goto judged }
        fi;
#if !defined(BREAK_MARK_IGNORED) && !defined(BREAK_MARK_BEFORE_PROCESS)
        atomic { seen = nonce };
#endif
        atomic {
            if
            :: seen != MARK && what == st && version == ver ->
                assert(!(working && st == ACTIVE));                     /* M9 */
                what = FREE
            :: else
            fi
        };
judged:
        atomic { st = 0; ver = 0; seen = 0 }
    :: judgements == 0 -> break
    od
}

init {
    atomic { run owner(0); run owner(1) }
}
