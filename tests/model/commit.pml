/*
 * The commit protocol: claim, store, commit, release, settle, read, collect, evict, take over.
 *
 * One transition of this model is one access to the shared region (a load, a store or a
 * compare-and-swap) with the private computing around it.  A process may stay unscheduled for
 * as long as spin likes, so every process is a zombie before every one of its accesses: pauses
 * need no code.  A death is `gone[p]`, set by `reaper` at any instant; the process then never
 * takes another step (its `provided` clause) and everybody may know that it is surely gone.
 *
 * Abstractions, and why each is sound:
 *  - A region of NB blocks; the root block points at two data blocks (objects 0 and 1).  Deeper
 *    trees add no new kind of access for writers and readers: a node is copied and its tag
 *    checked like a data block.  For the collector they matter: mark.pml.
 *  - An object's content is the number of commits made to it, kept in both halves of its block:
 *    a lost update shows as a wrong number, a torn copy as two different halves.
 *  - A claim is one step "some free block becomes mine".  The scan for a free word only
 *    chooses where to try the compare-and-swap, and a failed one changes nothing.  Which free
 *    block is taken is left open; blocks never used so far are interchangeable, so of those
 *    only the first is tried (exact symmetry reduction).
 *  - A writer plans in one step.  What it read piecemeal and checked by the reader's rule is
 *    what the root held when the commit word was loaded: that is the property of `reader`,
 *    which is checked here step by step (-DREADERS).  A failed check plans again, which is this
 *    step taken later.
 *  - The hint word is left out: it only delays writers, and a model in which nobody ever waits
 *    has all the behaviours of one in which somebody does.
 *  - Incarnations and counters are a few bits wide and the budgets keep them from wrapping;
 *    with 20 and 36 bits they do not wrap within the life of a claim either.
 *  - Sequentially consistent memory.  All shared words but block contents change by
 *    compare-and-swap (a full barrier on every machine); a content store that is not fenced
 *    before the commit is modelled as one that lands after it (BREAK_STORE_UNFENCED), a tag load
 *    not fenced after the copy as one that came before it (BREAK_CHECK_BEFORE_COPY).
 *
 * -DBREAK_x breaks rule x; see README.md for the list and what catches each.
 */

#ifndef NB
#define NB 6            /* blocks: 5, 6 or 7 */
#endif
#ifndef NS
#define NS 2            /* peer slots, at most 3 */
#endif
#ifndef TX1
#define TX1 2           /* transactions of peer 1, 2, 3; a peer without any is not started */
#endif
#ifndef TX2
#define TX2 1
#endif
#ifndef TX3
#define TX3 0
#endif
#ifndef DEATHS
#define DEATHS 0        /* peers that may be killed */
#endif
#ifndef JOINS
#define JOINS 0         /* joins (into a FREE slot, or over an IDLE one) in all */
#endif
#ifndef READS
#define READS 0         /* reads of the one reader */
#endif
#ifndef COLLECTS
#define COLLECTS 0      /* passes of each collector; with EVICTS it may evict first */
#endif
#ifndef COLLECTORS
#define COLLECTORS 1
#endif
#ifndef EVICTS
#define EVICTS 0
#endif
#ifndef REWINDS
#define REWINDS 0       /* mounts put back to where they were a transaction ago (VM snapshots) */
#endif
#ifndef FENCES
#define FENCES 0        /* times that somebody moves the commit sequence on */
#endif
#ifndef HALVES
#define HALVES 0        /* 1: storing a block takes two steps (wanted with readers) */
#endif

#define FREE    0
#define JOINING 1
#define IDLE    2
#define ACTIVE  3
#define DEAD    4

#define NONE 255
#define CTRS 16                                 /* counters per incarnation */
#define TAG(slot, ic) ((slot) * 64 + (ic))      /* 0 = free; ic = incarnation * CTRS + counter */
#define TAG_SLOT(tag) ((tag) / 64)
#define TAG_IC(tag)   ((tag) % 64)
#define NEXT_INC(ic)  (((ic) / CTRS + 1) * CTRS)

typedef Slot {          /* one 64-bit word: always read and changed as a whole */
    byte state;
    byte ic
};
typedef Block {
    byte tag;           /* the word in the tags table */
    byte own;           /* content: the tag it was claimed under */
    byte a, ta;         /* content of a root: pointer to object 0; of data: first half, - */
    byte b, tb          /*                    pointer to object 1;          second half, - */
};

Slot slot[NS + 1];      /* 1-based, like tags */
Block blk[NB];
byte W;                 /* commit word: sequence * 8 + root block */
#define ROOT   (W % 8)
#define NEXT_W(w, root) (((w) / 8 + 1) * 8 + (root))

/* What no peer knows: for the assertions only. */
byte value[2];          /* successful commits to each object */
short committed;        /* bit per pair of values (each at most 3): was the committed state */
#define STATE(x, y) (1 << ((x) * 4 + (y)))
byte used;              /* bit per block: was ever claimed */
byte inflight[4];       /* per peer: tag of its claims while they are unpublished, else 0 */
byte owner[NS + 1];     /* peer that last joined each slot */
bool gone[4];           /* killed */
bool storing[4];        /* between having seen itself in its slot and its last content store */
bool over[4];           /* peers that have finished */
byte busy;              /* other processes that have not */
byte joins = JOINS, deaths = DEATHS, evicts = EVICTS, rewinds = REWINDS;
#ifdef BREAK_LOCK
byte lock;              /* a lock that its holder alone may release */
#endif

#define REACHABLE(x) ((x) == ROOT || (x) == blk[ROOT].a || (x) == blk[ROOT].b)
#define IN_FLIGHT(t) ((t) == inflight[1] && !gone[1] || (t) == inflight[2] && !gone[2] || \
                      (t) == inflight[3] && !gone[3])

/* The committed tree: each block claimed under its pointer's tag, each object whole. */
inline check_tree() {
    assert(blk[ROOT].tag == blk[ROOT].own);                     /* M4 */
    assert(blk[blk[ROOT].a].tag == blk[ROOT].ta);               /* M4 */
    assert(blk[blk[ROOT].b].tag == blk[ROOT].tb);               /* M4 */
    assert(blk[ROOT].a != blk[ROOT].b && blk[ROOT].a != ROOT && blk[ROOT].b != ROOT);   /* M4 */
#ifndef BREAK_STORE_UNFENCED    /* there the reader shall find it */
    assert(blk[blk[ROOT].a].a == value[0] && blk[blk[ROOT].a].b == value[0]);   /* M2 */
    assert(blk[blk[ROOT].b].a == value[1] && blk[blk[ROOT].b].b == value[1])    /* M2 */
#endif
}

/* A claimable block: any that was used before, or the first that never was. */
#define CLAIMABLE(x) (blk[x].tag == 0 && \
    ((used >> (x)) & 1 || (x) == 0 || (used >> ((x) - 1)) & 1))
#if NB == 5
#define NO_FREE_BLOCK (blk[0].tag && blk[1].tag && blk[2].tag && blk[3].tag && blk[4].tag)
#elif NB == 6
#define NO_FREE_BLOCK (blk[0].tag && blk[1].tag && blk[2].tag && blk[3].tag && blk[4].tag \
    && blk[5].tag)
#elif NB == 7
#define NO_FREE_BLOCK (blk[0].tag && blk[1].tag && blk[2].tag && blk[3].tag && blk[4].tag \
    && blk[5].tag && blk[6].tag)
#endif

/* Chooses a free block; x = NONE when there is none. */
inline choose(x) {
    if
    :: CLAIMABLE(0) -> x = 0
    :: CLAIMABLE(1) -> x = 1
    :: CLAIMABLE(2) -> x = 2
    :: CLAIMABLE(3) -> x = 3
    :: CLAIMABLE(4) -> x = 4
#if NB > 5
    :: CLAIMABLE(5) -> x = 5
#endif
#if NB > 6
    :: CLAIMABLE(6) -> x = 6
#endif
    :: NO_FREE_BLOCK -> x = NONE
    fi
}

inline take(x) {
    if
    :: x == NONE -> goto abort                                      /* no space */
    :: else ->
        assert(!REACHABLE(x));                                      /* M4 */
        blk[x].tag = tag;
        used = used | (1 << x)
    fi
}

/* CAS of a tag word 0 -> mine, unless x already is a claim of this transaction. */
inline claim(x) {
#ifdef BREAK_CLAIM_BY_STORE         /* load 0, then store: two may find the same block free */
    atomic { if :: x == NONE -> choose(x) :: else fi };
    atomic { take(x) }
#else
    atomic { if :: x == NONE -> choose(x); take(x) :: else fi }
#endif
}

/* CAS of a tag word t -> 0: by a writer, for what it replaced or claimed in vain. */
inline release(x, t) {
    atomic {
        if
#if defined(BREAK_RELEASE_BY_STORE)
        :: x != NONE ->
            assert(!REACHABLE(x));                                  /* M5 */
            assert(blk[x].tag == t || !IN_FLIGHT(blk[x].tag));      /* M5 */
            blk[x].tag = 0
#else
        :: x != NONE && blk[x].tag == t ->
            assert(!REACHABLE(x));                                  /* M5 */
            blk[x].tag = 0
#endif
        :: else                     /* none, or somebody collected it meanwhile */
        fi
    }
}

#define MAY_STORE(x) (!REACHABLE(x) && blk[x].tag == tag)

inline store_data() {
    atomic {
        assert(MAY_STORE(n_data));                                  /* M1 */
        blk[n_data].own = tag;
        blk[n_data].a = v + 1;
#if HALVES
    };
    atomic {
        assert(MAY_STORE(n_data));                                  /* M1 */
#endif
#ifndef BREAK_STORE_UNFENCED        /* there it is still on its way when the commit is seen */
        blk[n_data].b = v + 1
#endif
    }
}

inline store_root() {
    atomic {
        assert(MAY_STORE(n_root));                                  /* M1 */
        blk[n_root].own = tag;
        blk[n_root].a = (obj == 0 -> n_data : k_blk);
        blk[n_root].ta = (obj == 0 -> tag : k_tag);
#if HALVES
    };
    atomic {
        assert(MAY_STORE(n_root));                                  /* M1 */
#endif
        blk[n_root].b = (obj == 1 -> n_data : k_blk);
        blk[n_root].tb = (obj == 1 -> tag : k_tag);
        storing[me] = false
    }
}

/* A silent peer's slot may be taken at any time, unless it is in a transaction. */
#ifdef BREAK_TAKE_OVER_ACTIVE
#define MAY_TAKE(i) (slot[i].state != DEAD)
#else
#define MAY_TAKE(i) (slot[i].state == FREE || slot[i].state == IDLE || slot[i].state == JOINING)
#endif
#define MINE(st) (slot[s].state == (st) && slot[s].ic == ic)

/*
 * A read-write mount.  It starts IDLE in slot `s` (0: in none), makes `txns` transactions and
 * ends IDLE.  Fenced, it joins again and goes on.
 */
proctype peer(byte me, s, txns) provided (!gone[me]) {
    byte ic;                        /* its incarnation and counter */
    byte w;                         /* commit word planned on */
    byte obj;                       /* object to change */
    byte v;                         /* its value in the root of w */
    byte o_blk, o_tag, o_root_tag;  /* replaced: the object's block, the root (block in w) */
    byte k_blk, k_tag;              /* kept: pointer to the other object */
    byte n_root, n_data;            /* claimed blocks */
    byte tag;                       /* of its claims */

    atomic {
        n_root = NONE;
        n_data = NONE;
        if
        :: s == 0 -> goto fenced
        :: else -> ic = CTRS        /* incarnation 1, counter 0 */
        fi
    };

begin:
    atomic {
        if
        :: txns == 0 -> goto finished
#if REWINDS > 0
        :: rewinds > 0 && ic % CTRS > 0 -> rewinds--; ic--; goto begin
#endif
#ifdef BREAK_BEGIN_BY_STORE
        :: txns > 0 ->
#else
        :: txns > 0 && MINE(IDLE) ->
#endif
#ifndef BREAK_COUNTER_STUCK
            ic++;
#endif
            slot[s].ic = ic;
            slot[s].state = ACTIVE;
#ifdef BREAK_NOT_ACTIVE             /* claims without having said so */
            slot[s].state = IDLE;
#endif
            tag = TAG(s, ic);
            inflight[me] = tag;
            if
            :: obj = 0
#ifndef ONE_OBJECT
            :: obj = 1
#endif
            fi
#ifndef BREAK_BEGIN_BY_STORE
        :: txns > 0 && !MINE(IDLE) -> goto fenced
#endif
        fi
    };

#ifdef BREAK_LOCK
    atomic { lock == 0 -> lock = me };
#endif
plan:
#ifdef BREAK_CHECK_BEFORE_LOAD
    atomic { if :: !MINE(ACTIVE) -> goto fenced :: else fi };
#endif
    atomic {
        w = W;
        o_root_tag = blk[ROOT].own;
        if
        :: obj == 0 ->
            o_blk = blk[ROOT].a; o_tag = blk[ROOT].ta; k_blk = blk[ROOT].b; k_tag = blk[ROOT].tb
        :: obj == 1 ->
            o_blk = blk[ROOT].b; o_tag = blk[ROOT].tb; k_blk = blk[ROOT].a; k_tag = blk[ROOT].ta
        fi;
        v = blk[o_blk].a
#if defined(BREAK_NO_STATE_CHECK) || defined(BREAK_CHECK_BEFORE_LOAD) || defined(BREAK_NOT_ACTIVE)
        ; storing[me] = true
#endif
    };
#if !defined(BREAK_NO_STATE_CHECK) && !defined(BREAK_CHECK_BEFORE_LOAD) \
    && !defined(BREAK_NOT_ACTIVE)
    /* Seen itself ACTIVE after loading w: whoever evicts it from now on moves W away from w. */
    atomic {
        if
#ifdef BREAK_REJOIN_WITHIN          /* a new incarnation goes on with the old one's claims */
        :: !MINE(ACTIVE) && !MINE(IDLE) && MAY_TAKE(1) ->
            ic = NEXT_INC(slot[1].ic); slot[1].ic = ic; slot[1].state = IDLE; owner[1] = me;
            goto plan
        :: MINE(ACTIVE) || MINE(IDLE) -> storing[me] = true
#else
        :: MINE(ACTIVE) -> storing[me] = true
#endif
        :: else -> goto fenced
        fi
    };
#endif

#ifdef BREAK_IN_PLACE               /* no copy: store into the published block */
    n_data = o_blk;
#endif
    claim(n_data);
    claim(n_root);
    store_data();
    store_root();
#ifdef BREAK_RELEASE_FIRST
    release(o_blk, o_tag);
#endif
#ifdef BREAK_IDLE_FIRST             /* settled before it is decided */
    atomic { if :: MINE(ACTIVE) -> slot[s].state = IDLE :: else fi };
#endif
#ifdef BREAK_COMMIT_BY_STORE
    atomic { if :: W != w -> goto plan :: else fi };
#endif
    atomic {                        /* the commit: CAS w -> (next sequence, new root) */
        if
#if defined(BREAK_COMMIT_BY_STORE)
        :: true ->
#elif defined(BREAK_NO_SEQUENCE)
        :: ROOT == w % 8 ->
#else
        :: W == w ->
#endif
            W = NEXT_W(W, n_root);
            value[obj] = value[obj] + 1;
#if READS > 0
            committed = committed | STATE(value[0], value[1]);
#endif
            inflight[me] = 0;
            txns--;
            check_tree()
        :: else ->
            if                      /* keep the claims and plan again, or give up */
            :: goto plan
#if READS > 0
            :: n_root = n_root ^ n_data; n_data = n_root ^ n_data; n_root = n_root ^ n_data;
                goto plan           /* with each block for the other use */
#endif
            :: goto abort
            fi
        fi
    };
#ifdef BREAK_STORE_UNFENCED
    atomic { blk[n_data].b = v + 1 };
#endif
#ifndef RELEASE_BEFORE_IDLE         /* equally safe: what it replaced is garbage already */
    atomic { if :: MINE(ACTIVE) -> slot[s].state = IDLE :: else fi };
#endif
    release(w % 8, o_root_tag);
    release(o_blk, o_tag);
#if REWINDS > 0 && !defined(RELEASE_BEFORE_IDLE)
    /* Put back to before its stores, after all this and whatever others do: the state word tells. */
    atomic { if :: rewinds > 0 && MINE(IDLE) -> rewinds-- :: true -> goto settle fi };
#ifdef BREAK_NO_GUARD               /* stores without looking at it */
    store_data();
    store_root();
#endif
#ifdef BREAK_RELEASE_UNENDED        /* releases claims of a transaction that it did not end */
    release(n_root, tag);
    release(n_data, tag);
#endif
    goto fenced;
#else
    goto settle;
#endif

abort:
    atomic {                                            /* nothing will be published */
        storing[me] = false; inflight[me] = 0; txns--;
        if
        :: MINE(ACTIVE) -> slot[s].state = IDLE
        :: else -> goto fenced                          /* what it claimed is not its own any more */
        fi
    };
    release(n_root, tag);
    release(n_data, tag);

settle:
#ifdef BREAK_LOCK
    lock = 0;
#endif
    atomic {
        tag = 0; n_root = NONE; n_data = NONE; w = 0; obj = 0; v = 0;
        o_blk = 0; o_tag = 0; o_root_tag = 0; k_blk = 0; k_tag = 0;
        if
#ifdef RELEASE_BEFORE_IDLE
        :: MINE(ACTIVE) -> slot[s].state = IDLE; goto begin
#endif
        :: MINE(IDLE) -> goto begin
        :: else -> goto fenced
        fi
    };

fenced:
    atomic {
        inflight[me] = 0; storing[me] = false;
        tag = 0; n_root = NONE; n_data = NONE; w = 0; obj = 0; v = 0; s = 0; ic = 0;
        o_blk = 0; o_tag = 0; o_root_tag = 0; k_blk = 0; k_tag = 0;
        if
        :: joins > 0 && txns > 0 ->
            joins--;
            if
            :: MAY_TAKE(1) -> s = 1
#if NS > 1
            :: MAY_TAKE(2) -> s = 2
#endif
#if NS > 2
            :: MAY_TAKE(3) -> s = 3
#endif
            :: else -> goto finished
            fi;
#ifdef BREAK_SAME_INCARNATION
            ic = (slot[s].ic / CTRS) * CTRS;
#else
            ic = NEXT_INC(slot[s].ic);
#endif
            slot[s].state = JOINING;
            slot[s].ic = ic;
            owner[s] = me
        :: else -> goto finished
        fi
    };
    atomic {
        if
        :: MINE(JOINING) -> slot[s].state = IDLE; goto begin
        :: else -> goto fenced
        fi
    };

finished:
    over[me] = true
}

#if READS > 0
/* Any mount, also a read-only one: it stores nothing. */
proctype reader() {
    byte w, a, ta, b, tb, x, y;
    byte reads = READS;
    byte v0;
    byte e0, e1;                    /* for the assertions: committed when this call began */
#ifdef ROOT_BY_BOUND_TAG
    byte bound;
#endif
#ifdef BREAK_CACHE_UNCONFIRMED
    byte cached = NONE, cached_tag, cached_a, cached_b;
#endif

begin:
    atomic { e0 = value[0]; e1 = value[1] };
again:
    w = W;
#ifdef ROOT_BY_BOUND_TAG            /* equally good: the tag of w's root, known before copying */
    bound = blk[w % 8].tag;
    if :: W != w -> goto again :: else fi;
#endif
    atomic { a = blk[w % 8].a; ta = blk[w % 8].ta };
    atomic { b = blk[w % 8].b; tb = blk[w % 8].tb; x = blk[w % 8].own };
/* Under the tag that it bears inside, and not torn (else its checksum would be wrong). */
#define WHOLE_ROOT (blk[w % 8].tag == x && blk[w % 8].a == a && blk[w % 8].ta == ta \
    && blk[w % 8].b == b && blk[w % 8].tb == tb)
#ifdef BREAK_CACHE_UNCONFIRMED      /* remembered before it is known to have been a root */
    atomic {
        if
        :: WHOLE_ROOT ->
            cached = w % 8; cached_tag = x; cached_a = a; cached_b = b
        :: true                     /* and stays cached while others are read */
        fi
    };
#endif
#if defined(BREAK_ROOT_UNCHECKED)
#elif defined(BREAK_ROOT_BY_OWN_TAG)    /* "the tag inside it is still the one in the table" */
    if :: !WHOLE_ROOT -> goto again :: else fi;
#elif defined(ROOT_BY_BOUND_TAG)
    if :: blk[w % 8].tag != bound -> goto again :: else fi;
#else
    if :: W != w -> goto again :: else fi;
#endif
    atomic {
        assert(a < NB && b < NB)                                    /* M3 */
    };
#ifdef BREAK_RETRY_OLD_ROOT         /* a stale copy: copied again, not looked for in the new root */
retry:
#endif
#ifdef BREAK_CHECK_BEFORE_COPY
    if :: blk[a].tag != ta -> goto again :: else fi;
#endif
#ifdef BREAK_CACHE_UNCONFIRMED
    atomic {
        if
        :: cached == a && cached_tag == ta -> x = cached_a; y = cached_b; goto copied
        :: else
        fi
    };
#endif
    x = blk[a].a;
    y = blk[a].b;
#if defined(BREAK_TAG_NOT_FREE)
    if :: blk[a].tag == 0 -> goto again :: else fi;
#elif defined(BREAK_RETRY_OLD_ROOT)
    if :: blk[a].tag != ta -> goto retry :: else fi;
#elif !defined(BREAK_CHECK_BEFORE_COPY) && !defined(BREAK_DATA_UNCHECKED)
    if :: blk[a].tag != ta -> goto again :: else fi;
#endif
#ifdef BREAK_CACHE_UNCONFIRMED
copied:
#endif
    atomic {
        assert(x == y);             /* whole */                     /* M3 */
        v0 = x
    };
    x = blk[b].a;
    y = blk[b].b;
    if :: blk[b].tag != tb -> goto again :: else fi;
    atomic {
        assert(x == y);                                             /* M3 */
        /* both of one committed state, which is no older than the call */
        assert(v0 < 4 && x < 4 && committed & STATE(v0, x));        /* M3 */
        assert(v0 >= e0 && x >= e1);                                /* M3 */
        reads--; v0 = 0; a = 0; ta = 0; b = 0; tb = 0; x = 0; y = 0;
        if :: reads > 0 -> goto begin :: else fi
    };
    busy--
}
#endif

/* What a slot's state word says about its claims: those below limit[] are settled. */
inline read_limit(i) {
        if
#ifdef BREAK_ACTIVE_SETTLED
        :: slot[i].state == ACTIVE -> limit[i] = slot[i].ic + 1
#else
        :: slot[i].state == ACTIVE -> limit[i] = slot[i].ic
#endif
#ifdef BREAK_DEAD_SETTLED               /* what it planned may still be published */
        :: slot[i].state == DEAD -> limit[i] = slot[i].ic + 1
#else
        :: slot[i].state == DEAD -> limit[i] = slot[i].ic
#endif
        :: slot[i].state != ACTIVE && slot[i].state != DEAD ->
#if defined(BREAK_IDLE_ALL_SETTLED)     /* "any claim of an IDLE slot": also the next one */
            limit[i] = NONE
#elif defined(BREAK_IDLE_UNSETTLED)     /* too careful: the last transaction's garbage stays */
            limit[i] = slot[i].ic
#else
            limit[i] = slot[i].ic + 1
#endif
        fi
}

#ifdef BREAK_OTHER_INCARNATION  /* "another incarnation": a newer one is no garbage */
#define SETTLED(t) (TAG_IC(t) / CTRS != limit[TAG_SLOT(t)] / CTRS || TAG_IC(t) < limit[TAG_SLOT(t)])
#else
#define SETTLED(t) (TAG_IC(t) < limit[TAG_SLOT(t)])
#endif

#if COLLECTS > 0
/* May the collector take the owner of slot i for dead? */
#if defined(BREAK_EVICT_PAUSED)
#define EVICTABLE(i) (slot[i].state == ACTIVE)
#elif defined(EVICT_BETWEEN)    /* also a live one (an administrator's error), but not while storing */
#define EVICTABLE(i) (slot[i].state == ACTIVE && (gone[owner[i]] || !storing[owner[i]]))
#else
#define EVICTABLE(i) (slot[i].state == ACTIVE && gone[owner[i]] || slot[i].state == DEAD)
#endif

#define MARKED(i, t) ((i == w && t == root_tag) || (i == a && t == ta) || (i == b && t == tb))

/* CAS (DEAD, ic) -> (FREE, ic): its claims are settled. */
inline free_dead() {
    if
    :: slot[dead].state == DEAD && slot[dead].ic == dead_ic -> slot[dead].state = FREE
    :: else
    fi;
    dead = 0; dead_ic = 0
}

/* Collects garbage; may evict one peer first.  Needs no slot: it claims nothing. */
proctype collector() {
    byte w, root_tag, a, ta, b, tb;         /* the marks: a root and its two objects */
    byte i, t;
    byte dead;                              /* slot being evicted, or 0 */
    byte dead_ic;
    byte passes = COLLECTS;
    byte limit[NS + 1];

pass:
#if EVICTS > 0
    atomic {
        if
        :: evicts > 0 && EVICTABLE(1) -> dead = 1
#if NS > 1
        :: evicts > 0 && EVICTABLE(2) -> dead = 2
#endif
#if NS > 2
        :: evicts > 0 && EVICTABLE(3) -> dead = 3
#endif
        :: goto evicted
        fi;
        evicts--;
        dead_ic = slot[dead].ic;
        slot[dead].state = DEAD;
        inflight[owner[dead]] = 0           /* it lost them */
    };
#ifdef BREAK_FREE_BEFORE_FENCE
    atomic { free_dead() };
#endif
#ifndef BREAK_NO_FENCE
fence:
    w = W;
    atomic {                                /* an empty commit: the same root, a new sequence */
        if
        :: W == w -> W = NEXT_W(w, w % 8); w = 0
        :: else -> goto fence
        fi
    };
#endif
#ifndef BREAK_FREE_BEFORE_FENCE
    atomic { free_dead() };
#endif
evicted:
#endif

#ifdef BREAK_ROOT_BEFORE_LIMITS
    atomic { w = ROOT; root_tag = blk[w].own; a = blk[w].a; ta = blk[w].ta; b = blk[w].b; tb = blk[w].tb };
#endif
    i = 1;
limits:
    atomic {
        read_limit(i);
        i++;
        if
        :: i <= NS -> goto limits
        :: else
        fi
    };
#ifndef BREAK_ROOT_BEFORE_LIMITS
    /* One step, as for a writer's plan; step by step, with stale nodes, in mark.pml. */
    atomic { w = ROOT; root_tag = blk[w].own; a = blk[w].a; ta = blk[w].ta; b = blk[w].b; tb = blk[w].tb };
#endif
    i = 0;
sweep:
    atomic {
        if
        :: i == NB -> goto swept
        :: else
        fi;
        t = blk[i].tag;
        if
        :: t == 0 || !SETTLED(t) || MARKED(i, t) -> t = 0; i++; goto sweep
        :: else
        fi
    };
    atomic {                                /* CAS t -> 0 */
        if
#ifdef BREAK_COLLECT_BY_STORE
        :: true ->
#else
        :: blk[i].tag == t ->
#endif
            assert(!REACHABLE(i));                                  /* M5 */
            assert(!IN_FLIGHT(blk[i].tag));                         /* M5 */
            blk[i].tag = 0
        :: else
        fi;
        t = 0; i++; goto sweep
    };
swept:
    atomic {
        i = 0; t = 0; w = 0; root_tag = 0; a = 0; ta = 0; b = 0; tb = 0;
        limit[1] = 0; limit[NS] = 0; limit[(NS > 2 -> 2 : 1)] = 0;
        passes--;
        if :: passes > 0 -> goto pass :: else fi
    };
    busy--
}
#endif

#if FENCES > 0
/* Lets every commit planned before fail, as an opener does that sees an intent (openlist.pml). */
proctype fencer() {
    byte w, n = FENCES;

    do
    :: n > 0 ->
        w = W;
        atomic {
            if
            :: W == w -> W = NEXT_W(w, w % 8); n--
            :: else
            fi
        }
    :: n == 0 -> break
    od;
    busy--
}
#endif

#if DEATHS > 0
active proctype reaper() {
end:
    do
    :: atomic { deaths > 0 -> deaths--;
        if
        :: !gone[1] && !over[1] -> gone[1] = true
        :: !gone[2] && !over[2] && TX2 > 0 -> gone[2] = true
        :: else
        fi
      }
    od
}
#endif

/* Collects in one step, by the collector's rules; leaves in `garbage` what it could not. */
inline collect_all() {
    k = 1;
    do
    :: k <= NS -> read_limit(k); k++
    :: else -> break
    od;
    k = 0;
    garbage = 0;
    do
    :: k < NB ->
        if
        :: blk[k].tag != 0 && !REACHABLE(k) ->
            if
            :: SETTLED(blk[k].tag) -> blk[k].tag = 0
            :: else -> garbage++
            fi
        :: else
        fi;
        k++
    :: else -> break
    od;
    k = 0
}

init {
    byte k, garbage, quiet;
    byte limit[NS + 1];
    d_step {
        /* mkfs: blocks 0 (root), 1 and 2 (objects), claimed by an incarnation long settled */
        blk[0].a = 1; blk[0].b = 2; blk[0].own = TAG(1, 1);
        blk[0].ta = TAG(1, 1); blk[0].tb = TAG(1, 1);
        blk[0].tag = TAG(1, 1); blk[1].tag = TAG(1, 1); blk[2].tag = TAG(1, 1);
        used = 7;
        committed = STATE(0, 0);
        k = 1;
        do
        :: k <= NS -> slot[k].state = IDLE; slot[k].ic = CTRS; owner[k] = k; k++
        :: else -> break
        od;
        k = 0
    };
    atomic {
        over[2] = (TX2 == 0);
        over[3] = (TX3 == 0);
        run peer(1, 1, TX1);
#if TX2 > 0
        run peer(2, (NS > 1 -> 2 : 0), TX2);
#endif
#if TX3 > 0
        run peer(3, (NS > 2 -> 3 : 0), TX3);
#endif
#if READS > 0
        busy++; run reader();
#endif
#if FENCES > 0
        busy++; run fencer();
#endif
#if COLLECTS > 0
        busy++; run collector();
#endif
#if COLLECTORS > 1
        busy++; run collector();
#endif
    };
    if
    :: busy == 0 && (over[1] || gone[1]) && (over[2] || gone[2]) && (over[3] || gone[3])
    :: timeout -> assert(false)     /* somebody waits for the dead */   /* M8 */
    fi;
    d_step {
        /*
         * All is quiet.  Free space comes back exactly, but for what is quarantined: at most the
         * claims of one transaction (two blocks) of each peer that fell silent in one.  Once it
         * is known to be gone, everything comes back.
         */
        check_tree();
        collect_all();
        quiet = 0;
        k = 1;
        do
        :: k <= NS ->
            if
            :: slot[k].state == ACTIVE ->
                assert(gone[owner[k]]);                             /* M6 */
                quiet++;
                slot[k].state = FREE
            :: else
            fi;
            k++
        :: else -> break
        od;
        assert(garbage <= 2 * quiet);                               /* M6 */
        collect_all();
        assert(garbage == 0)                                        /* M6 */
    }
}
