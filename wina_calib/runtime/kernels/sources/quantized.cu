/* Products of few rows with quantized weights, on the tensor cores of compute capability 8.0 and later.

   site: y = (x * [abs(x) * norm > threshold]) @ W + bias for ROWS rows x, reading only columns that a row keeps. Weights as
   in `quantization/formats.py`, by input. A block computes COLUMNS outputs from SLICE of the inputs. A warp lists the inputs
   that are kept of its own and takes 16 of them at a time: four threads read four columns each, eight times VEC bytes of
   every one. A weight is a number in float16, exact in 8 bits, scaled and rounded once in 4; inputs are float16 times a
   power of two that their warp chooses, exact for those of 16 bits, in two parts for float32. Sums are in float32.
   With CLUSTERED the blocks of a cluster add their sums up; without, `combine` adds those of `parts`. x is given as it is, or
   as what an RMSNorm or a gated activation makes it of (INPUT); the result is y, or what y is added to.

   rows: y = x @ W^T for int8 by rows, as lm_head's. dequantize: weights of some outputs by input, (in, outputs).

   Compiled with TYPE 0 float32, 1 bfloat16, 2 float16; BITS, GROUP, ZEROS of the format; ROWS, at most 8, of float32 4;
   VEC 8 or 16, WARPS, ACROSS of them, CLUSTER, SLICE, UNROLL steps in flight, INPUT; CLUSTERED and OVERLAP for Hopper and
   later. Results repeat bit for bit. */

#include "common.cuh"

#if TYPE == 0
#define SIDES 2
#else
#define SIDES 1
#endif

#define PLAIN 0
#define NORMED 1 /* gain * (x / rms(x)), rounded before the gain */
#define GATED 2  /* silu of the first half times the second half, rounded before the product */

#define THREADS (WARPS * 32)
#define FACTORS (ROWS * SIDES) /* columns of the second factor of a matrix product */

/* Two numbers of float16 at a time. */
__device__ static inline word times(word a, word b) {
    word found;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
    return found;
}
__device__ static inline word minus(word a, word b) {
    word found;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
    return found;
}
__device__ static inline word times_plus(word a, word b, word c) {
    word found;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(c));
    return found;
}
/* The bits of `bits` that are in `mask`, below those of `high`. */
__device__ static inline word pick(word bits, word mask, word high) {
    word found;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(found) : "r"(bits), "r"(mask), "r"(high));
    return found;
}

/* sum (16, 8) += a (16, 16) b (16, 8), of which each thread holds its share. */
__device__ static inline void multiply(float *sum, word a0, word a1, word a2, word a3, uint2 b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y));
}

/* The power of two that brings magnitudes up to that of the bits `highest` to 2^10 at least and below 2^11, and its inverse. */
__device__ static inline float scale_up(word highest) { return __uint_as_float(min(264 - (highest >> 23), 253u) << 23); }
__device__ static inline float scale_back(word highest) {
    return __uint_as_float((254 - min(264 - (highest >> 23), 253u)) << 23);
}

/* The parts of a scaled input, `apart` from each other. */
__device__ static inline void put(half *to, int apart, float value) {
    const half high = to_half(value);
    *to = high;
    if (SIDES == 2) to[apart] = to_half(value - from_half(high));
}

/* Two bytes of int8, with their highest bits turned, as float16: above a byte u 0x64 makes 1024 + u. */
__device__ static inline word number_8(word bytes, word which) { return minus(__byte_perm(bytes, 0x64646464u, which), 0x64806480u); }

#ifdef VEC
#define BYTES (8 * VEC)              /* of a column that a warp reads */
#define OWN (BYTES * 8 / BITS)       /* its outputs */
#define COLUMNS (ACROSS * OWN)       /* outputs of a block, ACROSS warps side by side */
#define DEEP (WARPS / ACROSS)        /* warps that share the block's inputs */
#define TILES (OWN / 16)             /* of 16 outputs, two of each of eight threads */
#define WORDS (VEC / 4)
#define PASSES ((SLICE + DEEP * 32 - 1) / (DEEP * 32))
#define ROOM (PASSES * 32 + 16)      /* of a warp's list: its inputs, and what fills the last 16 up */
#define STRIDE (COLUMNS + 8)         /* of a row of sums, so that rows lie in different banks */
#define SHARE (ROWS * COLUMNS / CLUSTER)

/* Of a block's outputs, in the order in which warps and threads hold them, the one at a place. */
__device__ static inline int output_at(int place) {
    const int first = place / OWN * OWN, thread = place % 8, tile = place % OWN / 16, second = place / 8 % 2;
#if BITS == 8
    return first + thread * VEC + 2 * tile + second;
#else
    const int at = thread * VEC + tile;
    return first + at / (GROUP / 2) * GROUP + at % (GROUP / 2) + second * (GROUP / 2);
#endif
}

/* The result at an output of a row, `at` among all, from its whole sum. */
__device__ static inline element finished(float sum, const void *scales, const element *bias, const element *added, int output,
                                          long long at) {
    if (BITS == 8) sum *= ((const float *)scales)[output];
    const element found = narrow(bias ? sum + widen(bias[output]) : sum);
    return added ? narrow(widen(added[at]) + widen(found)) : found;
}

/* 1 / rms of a row x (in), at 16 bytes and of whole 16 bytes, of all threads of a block; `room` has a float a warp. */
__device__ static inline float inverse_rms(const element *x, int in, float epsilon, float *room) {
    const int each = 16 / sizeof(element);
    float sum = 0.0f;
#pragma unroll
    for (int first = 0; first < SLICE * CLUSTER; first += THREADS * each) { /* bounds that are known: all loads at once */
        const int i = first + threadIdx.x * each;
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (i < in) bits = *(const uint4 *)(x + i);
        const word words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int w = 0; w < 4; w++) {
#if TYPE == 0
            const float value = __uint_as_float(words[w]);
            sum += value * value;
#else
            const float low = widen((half)(words[w] & 0xffff)), high = widen((half)(words[w] >> 16));
            sum += low * low + high * high;
#endif
        }
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(EVERY, sum, step);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += room[warp];
    __syncthreads();
    return rsqrtf(sum / in + epsilon);
}

/* What a thread holds of four columns: codes, and in 4 bits the scales and zeros of their group. */
struct Columns {
    word codes[4][WORDS];
    word scale[4];
    word zero[4];
};

__device__ static inline void multiply_all(float (*sum)[4], const Columns &c, uint2 b, int shift) {
#if BITS == 8
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
        word u[4];
#pragma unroll
        for (int j = 0; j < 4; j++) u[j] = c.codes[j][w] ^ 0x80808080u;
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const word order = upper ? 0x7362 : 0x5140, p = __byte_perm(u[0], u[1], order), q = __byte_perm(u[2], u[3], order);
            multiply(sum[2 * w + upper], number_8(p, 0x4140), number_8(p, 0x4342), number_8(q, 0x4140), number_8(q, 0x4342), b);
        }
    }
#else
    word scale[2], low[2], high[2]; /* of two columns: scale, 1024 + zero, -64 - zero */
#pragma unroll
    for (int i = 0; i < 2; i++) {
        scale[i] = c.scale[2 * i] | c.scale[2 * i + 1] << 16;
        const word zero = ZEROS ? (c.zero[2 * i] | c.zero[2 * i + 1] << 16) >> shift & 0x000f000fu : 0x00080008u;
        low[i] = 0x64006400u | zero;
        high[i] = 0xd400d400u | zero << 4;
    }
#pragma unroll
    for (int w = 0; w < WORDS; w++)
#pragma unroll
        for (int upper = 0; upper < 2; upper++) {
            const word order = upper ? 0x7632 : 0x5410;
            word p = __byte_perm(c.codes[0][w], c.codes[1][w], order), q = __byte_perm(c.codes[2][w], c.codes[3][w], order);
#pragma unroll
            for (int i = 0; i < 2; i++, p >>= 8, q >>= 8) {
                /* 1024 + code, and 1024 + 16 * code times 1/16 */
                const word a0 = minus(pick(p, 0x000f000fu, 0x64006400u), low[0]);
                const word a1 = times_plus(pick(p, 0x00f000f0u, 0x64006400u), 0x2c002c00u, high[0]);
                const word a2 = minus(pick(q, 0x000f000fu, 0x64006400u), low[1]);
                const word a3 = times_plus(pick(q, 0x00f000f0u, 0x64006400u), 0x2c002c00u, high[1]);
                multiply(sum[4 * w + 2 * upper + i], times(a0, scale[0]), times(a1, scale[0]), times(a2, scale[1]),
                         times(a3, scale[1]), b);
            }
        }
#endif
}

/* Grid (column blocks, CLUSTER). Shared memory: floats ROWS * (COLUMNS + DEEP * STRIDE + WARPS), and
   for each warp ROOM * (1 + FACTORS) halves. */
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#if CLUSTERED
    __cluster_dims__(1, CLUSTER, 1)
#endif
    site(const element *x, const float *norm, const float *threshold, const byte *dense, const byte *codes,
         const void *scales, const byte *zeros, const element *bias, element *y, float *parts, const element *gain,
         const element *added, int in, int out, int epsilon) {
    extern __shared__ __align__(16) float memory[];
    float *total = memory, *part = total + ROWS * COLUMNS, *back = part + DEEP * ROWS * STRIDE;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, deep = warp / ACROSS;
    const int first = blockIdx.y * SLICE, own_first = deep * 32 + lane, length = min(SLICE, in - first);
    half *list = (half *)(back + WARPS * ROWS) + warp * ROOM * (1 + FACTORS), *value = list + ROOM;
    float scale[PASSES], v[PASSES][ROWS], limit[ROWS];
    word kept[PASSES];
#if INPUT == NORMED
    element weight[PASSES];
#endif

    arrive();
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int i = pass * DEEP * 32 + own_first;
        scale[pass] = i < length ? __ldg(norm + first + i) : 0.0f;
#if INPUT == NORMED
        weight[pass] = i < length ? gain[first + i] : (element)0;
#endif
    }
    wait_for_inputs();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const element *own = x + (long long)r * in * (INPUT == GATED ? 2 : 1) + first;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int i = pass * DEEP * 32 + own_first;
            v[pass][r] = i < length ? widen(own[i]) : 0.0f;
        }
#if INPUT == NORMED
        const float inverse = inverse_rms(x + (long long)r * in, in, __int_as_float(epsilon), part);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++)
            v[pass][r] = widen(narrow(widen(weight[pass]) * widen(narrow(v[pass][r] * inverse))));
#elif INPUT == GATED
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int i = pass * DEEP * 32 + own_first;
            const float second = i < length ? widen(own[in + i]) : 0.0f;
            v[pass][r] = widen(narrow(widen(narrow(v[pass][r] / (1.0f + expf(-v[pass][r])))) * second));
        }
#endif
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) limit[r] = dense && dense[r] ? -1.0f : *threshold;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        bool any = false;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const bool keep = !(fabsf(v[pass][r]) * scale[pass] <= limit[r]); /* a NaN is kept, so that it shows */
            if (!keep) v[pass][r] = 0.0f;
            any |= keep;
        }
        kept[pass] = __ballot_sync(EVERY, any && pass * DEEP * 32 + own_first < length);
    }
    float up[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        word highest = 0;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) highest = max(highest, __float_as_uint(fabsf(v[pass][r])));
        highest = __reduce_max_sync(EVERY, highest);
        up[r] = scale_up(highest);
        if (lane == r) back[warp * ROWS + r] = scale_back(highest);
    }
    int count = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int at = count + __popc(kept[pass] & ((1u << lane) - 1));
        if (kept[pass] >> lane & 1) {
            list[at] = (half)(pass * DEEP * 32 + own_first);
#pragma unroll
            for (int r = 0; r < ROWS; r++) put(value + r * SIDES * ROOM + at, ROOM, v[pass][r] * up[r]);
        }
        count += __popc(kept[pass]);
    }
    __syncwarp();
    if (lane < 16) {
        list[count + lane] = list[max(count - 1, 0)]; /* read again, times zero */
#pragma unroll
        for (int n = 0; n < FACTORS; n++) value[n * ROOM + count + lane] = 0;
    }
    __syncwarp();

    const word wide = out * BITS / 8, groups = out / GROUP, zero_wide = (groups + 1) / 2;
    const int four = lane % 4, eighth = lane / 4, steps = (count + 15) / 16;
    /* Past the last output: the last ones again, whose sums are not written. */
    const word at = min((blockIdx.x * ACROSS + warp % ACROSS) * BYTES + eighth * VEC, wide - VEC), group = at / (GROUP / 2);
    float sum[TILES][4] = {};
    for (int step = 0; step < steps; step += UNROLL) {
        Columns c[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (step + u >= steps) break;
            const uint2 which = *(const uint2 *)(list + 16 * (step + u) + 4 * four);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const word k = first + ((j < 2 ? which.x : which.y) >> j % 2 * 16 & 0xffff);
#if VEC == 16
                const uint4 found = __ldcs((const uint4 *)(codes + (k * wide + at)));
                c[u].codes[j][0] = found.x, c[u].codes[j][1] = found.y, c[u].codes[j][2] = found.z, c[u].codes[j][3] = found.w;
#else
                const uint2 found = __ldcs((const uint2 *)(codes + (k * wide + at)));
                c[u].codes[j][0] = found.x, c[u].codes[j][1] = found.y;
#endif
#if BITS == 4
                c[u].scale[j] = __ldg((const half *)scales + (k * groups + group));
                if (ZEROS) c[u].zero[j] = __ldg(zeros + (k * zero_wide + group / 2));
#endif
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (step + u >= steps) break;
            uint2 b = make_uint2(0, 0);
            if (eighth < FACTORS) b = *(const uint2 *)(value + eighth * ROOM + 16 * (step + u) + 4 * four);
            multiply_all(sum, c[u], b, group % 2 * 4);
        }
    }

    /* The sums of the block's warps, of the cluster's blocks. */
#pragma unroll
    for (int n = 0; n < 3 - SIDES; n++) {
        const int r = SIDES == 2 ? four : 2 * four + n;
        if (r >= ROWS) continue;
        const float unit = back[warp * ROWS + r];
        float *to = part + (deep * ROWS + r) * STRIDE + warp % ACROSS * OWN + eighth;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const float *own = sum[tile], low = SIDES == 2 ? own[0] + own[1] : own[n];
            const float high = SIDES == 2 ? own[2] + own[3] : own[2 + n];
            to[16 * tile] = low * unit;
            to[16 * tile + 8] = high * unit;
        }
    }
    __syncthreads();
    await(); /* the others have begun, so that their memory can be written */
    for (int i = thread; i < ROWS * COLUMNS; i += THREADS) {
        const int r = i / COLUMNS, place = i % COLUMNS;
        float found = 0.0f;
#pragma unroll
        for (int w = 0; w < DEEP; w++) found += part[(w * ROWS + r) * STRIDE + place];
#if CLUSTERED
        give(total + blockIdx.y * SHARE + i % SHARE, i / SHARE, found);
#else
        const int output = blockIdx.x * COLUMNS + output_at(place);
        if (output < out) parts[((long long)blockIdx.y * ROWS + r) * out + output] = found;
#endif
    }
#if CLUSTERED
    arrive();
    await();
    /* The next kernel may start. Any earlier, its blocks would crowd where this one's end first. */
    let_next_start();
    for (int i = thread; i < SHARE; i += THREADS) {
        const int all = blockIdx.y * SHARE + i, r = all / COLUMNS, output = blockIdx.x * COLUMNS + output_at(all % COLUMNS);
        float found = 0.0f;
#pragma unroll
        for (int block = 0; block < CLUSTER; block++) found += total[block * SHARE + i];
        if (output < out) y[(long long)r * out + output] = finished(found, scales, bias, added, output, (long long)r * out + output);
    }
#endif
}

/* y (ROWS, out) from the sums of CLUSTER slices (CLUSTER, ROWS, out), in order. */
extern "C" __global__ void combine(const float *parts, const void *scales, const element *bias, element *y,
                                   const element *added, int out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= ROWS * out) return;
    float found = 0.0f;
#pragma unroll
    for (int slice = 0; slice < CLUSTER; slice++) found += parts[(long long)slice * ROWS * out + i];
    y[i] = finished(found, scales, bias, added, i % out, i);
}
#endif

#ifdef STEPS
/* Grid: as many blocks as fit. Each warp computes 16 outputs at a time, four threads of it reading 64 codes of a row.
   Shared memory: FACTORS * in halves, ROWS words. x (ROWS, in), codes (out, in), in a multiple of 64. */
extern "C" __global__ void __launch_bounds__(THREADS)
    rows(const element *x, const byte *codes, const float *scales, element *y, int in, int out) {
    extern __shared__ __align__(16) half value[];
    word *highest = (word *)(value + FACTORS * in);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, four = lane % 4, eighth = lane / 4;
    if (thread < ROWS) highest[thread] = 0;
    wait_for_inputs();
    let_next_start();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        word found = 0;
        for (int i = thread; i < in; i += THREADS) found = max(found, __float_as_uint(fabsf(widen(x[r * in + i]))));
        found = __reduce_max_sync(EVERY, found);
        if (lane == 0) atomicMax(highest + r, found);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        for (int i = thread; i < in; i += THREADS)
            put(value + r * SIDES * in + i, in, widen(x[r * in + i]) * scale_up(highest[r]));
    __syncthreads();

    const half *own = value + (eighth < FACTORS ? eighth : 0) * in + 16 * four;
    for (int tile = blockIdx.x * WARPS + warp; tile * 16 < out; tile += gridDim.x * WARPS) {
        const int row = tile * 16 + eighth;
        const byte *above = codes + (long long)min(row, out - 1) * in + 16 * four;
        const byte *below = codes + (long long)min(row + 8, out - 1) * in + 16 * four;
        float sum[4] = {};
        for (int k = 0; k < in; k += 64 * STEPS) {
            uint4 a[STEPS], c[STEPS];
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                const int at = k + 64 * s;
                a[s] = c[s] = make_uint4(0, 0, 0, 0);
                if (at < in) a[s] = read_once(above + at), c[s] = read_once(below + at);
            }
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                const int at = k + 64 * s;
                if (at >= in) break;
                const word p[4] = {a[s].x, a[s].y, a[s].z, a[s].w}, q[4] = {c[s].x, c[s].y, c[s].z, c[s].w};
                uint4 b[2] = {};
                if (eighth < FACTORS) b[0] = *(const uint4 *)(own + at), b[1] = *(const uint4 *)(own + at + 8);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const word u = p[j] ^ 0x80808080u, w = q[j] ^ 0x80808080u;
                    const uint4 both = b[j / 2];
                    const uint2 factor = j % 2 ? make_uint2(both.z, both.w) : make_uint2(both.x, both.y);
                    multiply(sum, number_8(u, 0x4140), number_8(w, 0x4140), number_8(u, 0x4342), number_8(w, 0x4342), factor);
                }
            }
        }
#pragma unroll
        for (int second = 0; second < 2; second++) {
            const int output = row + 8 * second;
            if (output >= out) continue;
#if SIDES == 2
            if (four < ROWS)
                y[(long long)four * out + output] = (sum[2 * second] + sum[2 * second + 1]) * scale_back(highest[four]) * scales[output];
#else
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const int r = 2 * four + n;
                if (r < ROWS) y[(long long)r * out + output] = narrow(sum[2 * second + n] * scale_back(highest[r]) * scales[output]);
            }
#endif
        }
    }
}
#endif

#ifdef TILE
/* Eight numbers at once. */
__device__ static inline void write_8(element *to, const float *values) {
    element made[8];
#pragma unroll
    for (int i = 0; i < 8; i++) made[i] = narrow(values[i]);
    const uint4 *from = (const uint4 *)made;
#pragma unroll
    for (int i = 0; i < (int)sizeof(made) / 16; i++) ((uint4 *)to)[i] = from[i];
}

/* Grid (blocks of eight bytes of a column, in). Weights of outputs from `first` to before `stop`, multiples of GROUP, as
   y (in, stop - first): products in float32, rounded once. A thread makes those of eight bytes. */
extern "C" __global__ void __launch_bounds__(256)
    dequantize(const byte *codes, const void *scales, const byte *zeros, element *y, int out, int first, int stop) {
    const long long k = blockIdx.y;
    const int made = stop - first, at = (blockIdx.x * 256 + threadIdx.x) * 8;
    wait_for_inputs();
    let_next_start();
    if (at >= made * BITS / 8) return;
    const uint2 both = *(const uint2 *)(codes + k * (out * BITS / 8) + first * BITS / 8 + at);
    element *to = y + k * made;
    float low[8];
#if BITS == 8
    const float *scale = (const float *)scales + first + at;
#pragma unroll
    for (int i = 0; i < 8; i++) low[i] = (float)(signed char)((i < 4 ? both.x : both.y) >> i % 4 * 8) * scale[i];
    write_8(to + at, low);
#else
    float high[8];
    const int groups = out / GROUP, own = at / (GROUP / 2), group = first / GROUP + own;
    const float scale = from_half(((const half *)scales)[k * groups + group]);
    const int zero = ZEROS ? zeros[k * ((groups + 1) / 2) + group / 2] >> group % 2 * 4 & 15 : 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const word bits = (i < 4 ? both.x : both.y) >> i % 4 * 8;
        low[i] = (float)((int)(bits & 15) - zero) * scale;
        high[i] = (float)((int)(bits >> 4 & 15) - zero) * scale;
    }
    to += own * GROUP + at % (GROUP / 2);
    write_8(to, low);
    write_8(to + GROUP / 2, high);
#endif
}
#endif
