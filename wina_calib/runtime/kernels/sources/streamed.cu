/* One row times weights of 4 bits whose kept columns stream through shared memory; format and rule as in `quantized.cu`.

   A block computes ACROSS * 256 outputs from SLICE of the inputs. All its warps list the inputs that are kept. Then TEAMS of ACROSS
   warps take 16 of them at a time in turn, and copy their columns STAGES - 1 steps ahead. Codes are subnormal numbers of float16 as
   they lie, which tensor cores multiply exactly; the second factor are inputs times scales, of which a warp has a column for each of
   its groups, so that of a thread's sums, in float32, one in eight is wanted, and a code costs one mask. Zeros are the codes of one
   more product, which is subtracted. The blocks of a cluster add their sums up. Results repeat bit for bit.

   Compiled with TYPE 1 bfloat16, 2 float16; GROUP, ZEROS of the format; ACROSS, TEAMS, CLUSTER, STAGES, SLICE, INPUT, BLOCKS
   that a processor shall hold. For Hopper and later. */

#include "common.cuh"

#define PLAIN 0
#define NORMED 1 /* gain * (x / rms(x)), rounded before the gain */
#define GATED 2  /* silu of the first half times the second half, rounded before the product */

#define WARPS (ACROSS * TEAMS)
#define THREADS (WARPS * 32)
#define STEP 16
#define OWN_BYTES 128               /* of a column, of a warp */
#define OWN (OWN_BYTES * 2)         /* its outputs */
#define TILES (OWN / 16)            /* of 16 outputs, two of each of eight threads */
#define GROUPS (OWN / GROUP)
#define STRIP (ACROSS * OWN)        /* outputs of a block */
#define PASSES ((SLICE + THREADS - 1) / THREADS)
#define ROOM ((SLICE + STEP - 1) / STEP * STEP)
#define CODE_PITCH (ACROSS * OWN_BYTES + 32) /* four neighbours lie in different banks */
#define SCALE_PITCH (ACROSS * GROUPS * 2)
#define ZERO_WORDS ((ACROSS * GROUPS / 2 + 3) / 4)
#define STAGE_BYTES (STEP * (CODE_PITCH + SCALE_PITCH + ZEROS * 4 * ZERO_WORDS))
#define CHUNK (SCALE_PITCH < 16 ? SCALE_PITCH : 16)
#define EACH (STEP / ACROSS)        /* columns of which a warp copies scales and zeros for its team */
#define EIGHTH 20                   /* floats that an eighth of a warp's low or high nibbles has for 16 sums */
#define HALF (8 * EIGHTH)
#define PART (2 * HALF)
#define SHARE ((STRIP + CLUSTER - 1) / CLUSTER)

__device__ static inline word shared_address(const void *at) { return (word)__cvta_generic_to_shared(at); }

__device__ static inline word times(word a, word b) {
    word found;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
    return found;
}

/* sum (16, 8) += a (16, 16) b (16, 8), of which each thread holds its share. */
__device__ static inline void multiply(float *sum, word a0, word a1, word a2, word a3, word b0, word b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* The power of two that brings magnitudes up to that of the bits `highest` below 2^6, so that times a scale below 1,024 they are
   numbers of float16; and its inverse. */
__device__ static inline float scale_up(word highest) { return __uint_as_float(min(259 - (highest >> 23), 253u) << 23); }
__device__ static inline float scale_back(word highest) {
    return __uint_as_float((254 - min(259 - (highest >> 23), 253u)) << 23);
}

template <int BYTES> __device__ static inline void copy(void *to, const void *from) {
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES) : "memory");
}
/* What was copied since the last one belongs together. */
__device__ static inline void end_of_step() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Wait for all of this thread's steps but the last STAGES - 2. */
__device__ static inline void wait_for_step() { asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory"); }
__device__ static inline void meet(int team) {
    if (ACROSS == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(ACROSS * 32) : "memory");
}

/* 1 / rms of a row x (in), at 16 bytes and of whole 16 bytes, of all threads of a block; `room` has a float a warp. */
__device__ static inline float inverse_rms(const element *x, int in, float epsilon, float *room) {
    float sum = 0.0f;
#pragma unroll
    for (int first = 0; first < SLICE * CLUSTER; first += THREADS * 8) { /* bounds that are known: all loads at once */
        const int i = first + threadIdx.x * 8;
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (i < in) bits = *(const uint4 *)(x + i);
        const word words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const float low = widen((half)(words[w] & 0xffff)), high = widen((half)(words[w] >> 16));
            sum += low * low + high * high;
        }
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(EVERY, sum, step);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += room[warp];
    return rsqrtf(sum / in + epsilon);
}

/* Add a warp's products with the columns of a step: `codes`, `scales` and `zeros` are the warp's of the first of them, `x` the inputs
   in the order in which threads want them. A thread has columns 4 * j + lane % 4, eight threads a column; b is of group lane / 4. */
__device__ static inline void add_step(float (*sum)[4], float *of_zeros, const byte *codes, const byte *scales, const byte *zeros,
                                       const half *x) {
    const int four = threadIdx.x % 4, eighth = threadIdx.x % 32 / 4, group = eighth % GROUPS;
    word code[4][4], scale[4], zero[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int column = four + 4 * j;
        const uint4 found = *(const uint4 *)(codes + column * CODE_PITCH + eighth * 16);
        code[j][0] = found.x, code[j][1] = found.y, code[j][2] = found.z, code[j][3] = found.w;
        scale[j] = *(const half *)(scales + column * SCALE_PITCH + 2 * group);
        zero[j] = ZEROS ? zeros[column * 4 * ZERO_WORDS + group / 2] : 0x88;
    }
    const uint2 v = *(const uint2 *)(x + 4 * four);
    const word b0 = times(v.x, __byte_perm(scale[0], scale[1], 0x5410)), b1 = times(v.y, __byte_perm(scale[2], scale[3], 0x5410));
    multiply(of_zeros, __byte_perm(zero[0], zero[1], 0x5410) >> group % 2 * 4 & 0x000f000fu, 0,
             __byte_perm(zero[2], zero[3], 0x5410) >> group % 2 * 4 & 0x000f000fu, 0, b0, b1);
#pragma unroll
    for (int w = 0; w < 4; w++)
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const word order = upper ? 0x7632 : 0x5410;
            word p = __byte_perm(code[0][w], code[1][w], order), q = __byte_perm(code[2][w], code[3][w], order);
#pragma unroll
            for (int i = 0; i < 2; i++, p >>= 8, q >>= 8) /* a nibble is its code times 2^-24, or 2^-20 */
                multiply(sum[4 * w + 2 * upper + i], p & 0x000f000fu, p & 0x00f000f0u, q & 0x000f000fu, q & 0x00f000f0u, b0, b1);
        }
}

/* Grid (strips, CLUSTER). Shared memory: TEAMS * STAGES * STAGE_BYTES, floats CLUSTER * SHARE, to a multiple of 4, + WARPS, words ROOM
   + 2 * WARPS, ROOM halves. Rows of codes and of scales are multiples of 16 bytes, of 8 with ACROSS 1 and groups of 64, of zeros of 4. */
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) __cluster_dims__(1, CLUSTER, 1)
    streamed(const element *x, const float *norm, const float *threshold, const byte *dense, const byte *codes, const byte *scales,
             const byte *zeros, const element *bias, element *y, const element *gain, const element *added, int in, int out,
             int epsilon) {
    extern __shared__ __align__(128) byte memory[];
    float *total = (float *)(memory + TEAMS * STAGES * STAGE_BYTES), *room = total + (CLUSTER * SHARE + 3) / 4 * 4 + ROOM + ROOM / 2;
    word *list = (word *)(total + (CLUSTER * SHARE + 3) / 4 * 4), *counts = (word *)(room + WARPS), *tops = counts + WARPS;
    half *value = (half *)(list + ROOM);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int first = blockIdx.y * SLICE, length = min(SLICE, in - first);
    float scale[PASSES], v[PASSES];
    word kept[PASSES];
#if INPUT == NORMED
    element weight[PASSES];
#endif

    arrive();
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int i = pass * THREADS + thread;
        scale[pass] = i < length ? __ldg(norm + first + i) : 0.0f;
#if INPUT == NORMED
        weight[pass] = i < length ? gain[first + i] : (element)0;
#endif
    }
    wait_for_inputs();
    const float limit = dense && *dense ? -1.0f : *threshold;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int i = pass * THREADS + thread;
        v[pass] = i < length ? widen(x[first + i]) : 0.0f;
#if INPUT == GATED
        const float second = i < length ? widen(x[in + first + i]) : 0.0f;
        v[pass] = widen(narrow(widen(narrow(v[pass] / (1.0f + expf(-v[pass])))) * second));
#endif
    }
#if INPUT == NORMED
    const float inverse = inverse_rms(x, in, __int_as_float(epsilon), room);
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++)
        v[pass] = widen(narrow(widen(weight[pass]) * widen(narrow(v[pass] * inverse))));
#endif

    /* The list of what is kept, and the highest magnitude in it. */
    word highest = 0;
    int count = 0, place = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        /* a NaN is kept, so that it shows */
        const bool keep = pass * THREADS + thread < length && !(fabsf(v[pass]) * scale[pass] <= limit);
        kept[pass] = __ballot_sync(EVERY, keep);
        count += __popc(kept[pass]);
        if (keep) highest = max(highest, __float_as_uint(fabsf(v[pass])));
    }
    highest = __reduce_max_sync(EVERY, highest);
    if (lane == 0) counts[warp] = count, tops[warp] = highest;
    __syncthreads();
    count = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w == warp) place = count;
        count += counts[w];
        highest = max(highest, tops[w]);
    }
    const float up = scale_up(highest), back = scale_back(highest);
    /* Of a step's columns, those of a thread lie together. */
#define PLACE(AT) ((AT) / STEP * STEP + (AT) % 4 * 4 + (AT) % STEP / 4)
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        if (kept[pass] >> lane & 1) {
            const int at = place + __popc(kept[pass] & ((1u << lane) - 1));
            list[PLACE(at)] = first + pass * THREADS + thread;
            value[PLACE(at)] = to_half(v[pass] * up);
        }
        place += __popc(kept[pass]);
    }
    const int steps = (count + STEP - 1) / STEP;
    if (thread < steps * STEP - count) { /* the last step is filled up with any column, times zero */
        list[PLACE(count + thread)] = first;
        value[PLACE(count + thread)] = 0;
    }
    __syncthreads();

    /* Past the last output: the last ones again, whose sums are not written. */
    const word wide = out / 2, scale_wide = out / GROUP * 2, zero_wide = (out / GROUP + 1) / 2;
    const int across = warp % ACROSS, team = warp / ACROSS, eighth = lane / 4;
    const word code_at = min(blockIdx.x * (STRIP / 2) + across * OWN_BYTES + lane % 8 * 16, wide - 16);
    const word zero_at = blockIdx.x * (ACROSS * GROUPS / 2);
    byte *ring = memory + team * STAGES * STAGE_BYTES;
    float sum[TILES][4] = {}, of_zeros[4] = {};
    auto ask_for = [&](int step, int stage) {
        if (step < steps) {
            byte *to = ring + stage * STAGE_BYTES;
            const word *which = list + step * STEP;
            const uint4 mine = *(const uint4 *)(which + lane / 8 * 4);
            const word k[4] = {mine.x, mine.y, mine.z, mine.w};
            byte *to_codes = to + lane / 8 * CODE_PITCH + across * OWN_BYTES + lane % 8 * 16;
#pragma unroll
            for (int j = 0; j < 4; j++) copy<16>(to_codes + 4 * j * CODE_PITCH, codes + (k[j] * wide + code_at));
            const int pieces = SCALE_PITCH / CHUNK, column = across * EACH + lane / pieces, piece = lane % pieces * CHUNK;
            const word scale_at = min(blockIdx.x * SCALE_PITCH + piece, scale_wide - CHUNK);
            if (lane < EACH * pieces)
                copy<CHUNK>(to + STEP * CODE_PITCH + column * SCALE_PITCH + piece, scales + (which[PLACE(column)] * scale_wide + scale_at));
#if ZEROS
            const int of = across * EACH + lane / ZERO_WORDS, at = lane % ZERO_WORDS * 4;
            if (lane < EACH * ZERO_WORDS)
                copy<4>(to + STEP * (CODE_PITCH + SCALE_PITCH) + of * 4 * ZERO_WORDS + at,
                        zeros + (which[PLACE(of)] * zero_wide + min((zero_at & ~3u) + at, zero_wide - 4)));
#endif
        }
        end_of_step();
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) ask_for(team + s * TEAMS, s);
    int stage = 0;
    for (int step = team; step < steps; step += TEAMS) {
        wait_for_step();
        meet(team); /* all have what they asked for, and are done with the stage that is asked for next */
        ask_for(step + (STAGES - 1) * TEAMS, stage ? stage - 1 : STAGES - 1);
        const byte *from = ring + stage * STAGE_BYTES, *scales_from = from + STEP * CODE_PITCH;
        add_step(sum, of_zeros, from + across * OWN_BYTES, scales_from + across * GROUPS * 2,
                 scales_from + STEP * SCALE_PITCH + across * (GROUPS / 2) + zero_at % 4, value + step * STEP);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    meet(team);

    /* What is wanted of a warp's sums: of an output, the column of its group. They go where columns were. */
    float *part = (float *)ring + across * PART;
    const int group = eighth * 16 / (GROUP / 2);
    const float zero = __shfl_sync(EVERY, eighth % 2 ? of_zeros[1] : of_zeros[0], group * 4 + group / 2);
    if (lane % 4 == group / 2)
#pragma unroll
        for (int tile = 0; tile < TILES; tile += 4) {
            float low[4], high[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *found = sum[tile + i];
                low[i] = ((group % 2 ? found[1] : found[0]) - zero) * 0x1p24f * back;
                high[i] = ((group % 2 ? found[3] : found[2]) * 0.0625f - zero) * 0x1p24f * back;
            }
            float *to = part + eighth * EIGHTH + tile;
            *(float4 *)to = make_float4(low[0], low[1], low[2], low[3]);
            *(float4 *)(to + HALF) = make_float4(high[0], high[1], high[2], high[3]);
        }

    /* The sums of the block's teams, of the cluster's blocks. */
    __syncthreads();
    await(); /* the others have begun, so that their memory can be written */
    for (int o = thread; o < STRIP; o += THREADS) {
        const int at = o % OWN / GROUP * (GROUP / 2) + o % (GROUP / 2), upper = o / (GROUP / 2) % 2;
        const float *own = (const float *)memory + o / OWN * PART + upper * HALF + at / 16 * EIGHTH + at % 16;
        float found = 0.0f;
#pragma unroll
        for (int t = 0; t < TEAMS; t++) found += own[t * (STAGES * STAGE_BYTES / 4)];
        give(total + blockIdx.y * SHARE + o % SHARE, o / SHARE, found);
    }
    arrive();
    await();
    /* The next kernel may start. */
    let_next_start();
    for (int i = thread; i < SHARE; i += THREADS) {
        const int o = blockIdx.y * SHARE + i, output = blockIdx.x * STRIP + o;
        float found = 0.0f;
#pragma unroll
        for (int block = 0; block < CLUSTER; block++) found += total[block * SHARE + i];
        if (o >= STRIP || output >= out) continue;
        const element whole = narrow(bias ? found + widen(bias[output]) : found);
        y[output] = added ? narrow(widen(added[output]) + widen(whole)) : whole;
    }
}
