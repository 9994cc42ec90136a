/*
 * The collector's marking, while the tree changes under it.
 *
 * commit.pml lets the collector copy the tree in one step.  Here it walks: root, index node,
 * data; each copy is checked by its tag; a stale node, or the end of its time slice, makes it
 * start again from the newest root and keep the marks of finished subtrees.
 *
 * Tree: root -> node -> two data blocks.  A transaction replaces the root alone (something else
 * in it changed) or a data block and the path above it.  Data blocks are marked, never read.
 *
 * Abstractions, and why each is sound:
 *  - One writer, in one slot and one incarnation: what several do to each other, and how the
 *    limits of several slots combine, is commit.pml's.  To the collector a region with several
 *    writers is a sequence of commits, of claims in flight and of releases.
 *  - A writer claims and fills all its blocks in one step: the collector is told by the tag
 *    that a block is not what it was, before and after it is filled.
 *  - The writer may skip a release: the garbage of one that died there.
 */

#ifndef NB
#define NB 7            /* 4 reachable, 3 for a transaction in flight */
#endif
#ifndef TXNS
#define TXNS 3
#endif
#ifndef PASSES
#define PASSES 1        /* while the writer works; one more follows when it is done */
#endif
#ifndef SLICES
#define SLICES 1        /* times the collector runs out of its time slice while marking */
#endif

#define NONE 255

typedef Block {
    byte tag;                   /* word in the tags table; one slot, so a counter is enough */
    byte a, ta, b, tb           /* pointers: of the root only a (the node), of the node both */
};
Block blk[NB];
byte W;                         /* commit word: sequence * 8 + root block */
byte counter = 1;               /* the slot's state word: this and */
bool busy;                    /* is it ACTIVE (or IDLE) */
byte used = 15;
byte root_tag = 1;              /* tag of the root; it is inside the root block */
byte inflight;                  /* tag of claims not published, for the assertions */
bool done;

#define ROOT (W % 8)
#define NODE (blk[ROOT].a)
#define REACHABLE(x) ((x) == ROOT || (x) == NODE || (x) == blk[NODE].a || (x) == blk[NODE].b)
/* Any block used before, or the first that never was (they are interchangeable). */
#define CLAIMABLE(x) (blk[x].tag == 0 && \
    ((used >> (x)) & 1 || (x) == 0 || (used >> ((x) - 1)) & 1))

/* Some free block becomes ours. */
inline claim(x) {
    if
    :: CLAIMABLE(0) -> x = 0
    :: CLAIMABLE(1) -> x = 1
    :: CLAIMABLE(2) -> x = 2
    :: CLAIMABLE(3) -> x = 3
    :: CLAIMABLE(4) -> x = 4
    :: CLAIMABLE(5) -> x = 5
    :: CLAIMABLE(6) -> x = 6
    fi;
    assert(!REACHABLE(x));                                          /* M4 */
    blk[x].tag = counter;
    used = used | (1 << x)
}

inline release(x, t) {
    atomic {
        if
        :: x != NONE && blk[x].tag == t ->
            assert(!REACHABLE(x));                                  /* M5 */
            blk[x].tag = 0
        :: else
        :: true                         /* died here: garbage */
        fi
    }
}

#define FREE_BLOCKS ((blk[0].tag == 0) + (blk[1].tag == 0) + (blk[2].tag == 0) \
    + (blk[3].tag == 0) + (blk[4].tag == 0) + (blk[5].tag == 0) + (blk[6].tag == 0))

proctype writer() {
    byte txns = TXNS;
    byte n_root = NONE, n_node = NONE, n_data = NONE;
    byte o_root, o_root_tag, o_node = NONE, o_node_tag, o_data = NONE, o_data_tag;

    do
    :: atomic { txns > 0 ->
            txns--;
            counter++;
            busy = true
        };
        atomic {
            o_root = ROOT; o_root_tag = root_tag;
            if
            :: FREE_BLOCKS >= 1 ->                      /* the root alone */
                claim(n_root);
                blk[n_root].a = blk[o_root].a; blk[n_root].ta = blk[o_root].ta
            :: FREE_BLOCKS >= 3 ->                      /* a data block and its path */
                o_node = NODE; o_node_tag = blk[o_root].ta;
                claim(n_data); claim(n_node); claim(n_root);
                blk[n_root].a = n_node; blk[n_root].ta = counter;
                if
                :: o_data = blk[o_node].a; o_data_tag = blk[o_node].ta;
                    blk[n_node].a = n_data; blk[n_node].ta = counter;
                    blk[n_node].b = blk[o_node].b; blk[n_node].tb = blk[o_node].tb
                :: o_data = blk[o_node].b; o_data_tag = blk[o_node].tb;
                    blk[n_node].b = n_data; blk[n_node].tb = counter;
                    blk[n_node].a = blk[o_node].a; blk[n_node].ta = blk[o_node].ta
                fi;
                blk[n_data].a = 0; blk[n_data].ta = 0; blk[n_data].b = 0; blk[n_data].tb = 0
            :: FREE_BLOCKS == 0 -> goto settle
            fi;
            blk[n_root].b = 0; blk[n_root].tb = 0;
            inflight = counter
        };
        atomic {
            W = (W / 8 + 1) * 8 + n_root;
            root_tag = counter;
            inflight = 0;
            n_root = NONE; n_node = NONE; n_data = NONE
        };
        release(o_root, o_root_tag);
        release(o_node, o_node_tag);
        release(o_data, o_data_tag);
settle: atomic {
            busy = false;
            o_root = 0; o_root_tag = 0; o_node = NONE; o_node_tag = 0; o_data = NONE; o_data_tag = 0
        }
    :: atomic { txns == 0 -> done = true; break }
    od
}

byte mark[NB];                          /* private: tag under which each block was reached */
#ifdef BREAK_MARKS_WITHOUT_TAG
#define FINISHED(x, t) (mark[x] != 0)
#else
#define FINISHED(x, t) (mark[x] == (t))
#endif

inline forget_marks() {
    mark[0] = 0; mark[1] = 0; mark[2] = 0; mark[3] = 0; mark[4] = 0; mark[5] = 0; mark[6] = 0
}

/* The time slice may end at any point while marking: the next one begins at the newest root. */
inline slice() {
    if
#ifdef BREAK_SWEEP_UNFINISHED
    :: slices > 0 -> slices--; goto sweep
#else
    :: slices > 0 -> slices--; goto restart
#endif
    :: true
    fi
}

proctype collector() {
    byte limit, w, rt, node, node_tag, a, ta, b, tb, i, t;
    byte passes = PASSES + 1, slices = SLICES;

pass:
    atomic { passes > 1 || done ->
        forget_marks();
        limit = counter + !busy       /* claims below are settled */
    };
restart:
    atomic { a = 0; ta = 0; b = 0; tb = 0; node = 0; node_tag = 0; rt = 0; w = W };
    atomic { node = blk[w % 8].a; node_tag = blk[w % 8].ta; rt = root_tag };
    atomic {
#ifndef BREAK_ROOT_UNCHECKED
        if
        :: W != w -> goto restart
        :: else
        fi;
#endif
        if
        :: node >= NB -> goto restart
        :: FINISHED(node, node_tag) -> goto node_done
        :: else
        fi
    };
    atomic {
        a = blk[node].a; ta = blk[node].ta; b = blk[node].b; tb = blk[node].tb
    };
    atomic {
#ifndef BREAK_NODE_UNCHECKED
        if
        :: blk[node].tag != node_tag -> goto restart
        :: else
        fi;
#endif
#ifdef BREAK_PARENT_FIRST               /* marked as finished before its children are */
        mark[node] = node_tag;
#endif
        mark[a] = ta;
        slice();
        mark[b] = tb;
        slice();
        mark[node] = node_tag;
        slice()
    };
node_done:
    atomic { mark[w % 8] = rt };

sweep:
    atomic {
        if
        :: i == NB -> goto swept
        :: else
        fi;
        t = blk[i].tag;
        if
        :: t == 0 || t >= limit || mark[i] == t -> t = 0; i++; goto sweep
        :: else
        fi
    };
    atomic {
        if
        :: blk[i].tag == t ->
            assert(!REACHABLE(i));                                  /* M5 */
            assert(t != inflight);                                  /* M5 */
            blk[i].tag = 0
        :: else
        fi;
        t = 0; i++; goto sweep
    };
swept:
    atomic {
        i = 0; w = 0; rt = 0; node = 0; node_tag = 0; a = 0; ta = 0; b = 0; tb = 0; limit = 0;
        forget_marks();
        passes--;
        if
        :: passes > 0 -> goto pass
        :: else -> assert(FREE_BLOCKS == NB - 4)                    /* M6 */
        fi
    }
}

init {
    d_step {
        blk[0].a = 1; blk[0].ta = 1;
        blk[1].a = 2; blk[1].ta = 1; blk[1].b = 3; blk[1].tb = 1;
        blk[0].tag = 1; blk[1].tag = 1; blk[2].tag = 1; blk[3].tag = 1
    };
    atomic { run writer(); run collector() }
}
