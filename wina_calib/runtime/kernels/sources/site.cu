/* y = (x * [abs(x) * norm > threshold]) @ weight + bias for one row x, reading only the kept rows of `weight` (in, out).

   A cluster of CLUSTER blocks computes COLUMNS outputs, each block from SLICE of the inputs. A warp lists the inputs that
   it keeps of its own and reads their rows, 16 bytes a thread and UNROLL of them in flight; sums are in float32. The
   blocks of a cluster hand their sums to one another, each adds up a share of the outputs in a fixed order: no second
   kernel, no atomics, and results that repeat bit for bit. For cards with clusters: compute capability 9 and later.

   Compiled with TYPE 0 float32, 1 bfloat16, 2 float16; LANES threads that share a row; WARPS, CLUSTER, UNROLL, SLICE. */

#define CLUSTERED 1
#define OVERLAP 1
#include "common.cuh"

#if TYPE == 0
#define VECTOR 4
#else
#define VECTOR 8
#endif

#define COLUMNS (LANES * VECTOR)
#define ROWS (32 / LANES) /* that a warp reads at a time */
#define THREADS (WARPS * 32)
#define SHARE (COLUMNS / CLUSTER) /* outputs that a block of the cluster adds up */
#define PASSES ((SLICE + THREADS - 1) / THREADS)

__device__ static inline void add(float *sum, word bits, float value) {
#if TYPE == 0
    sum[0] += __uint_as_float(bits) * value;
#elif TYPE == 1
    sum[0] += __uint_as_float(bits << 16) * value;
    sum[1] += __uint_as_float(bits & 0xffff0000u) * value;
#else
    sum[0] += widen((half)(bits & 0xffffu)) * value;
    sum[1] += widen((half)(bits >> 16)) * value;
#endif
}

__device__ static inline void add_all(float *sum, uint4 bits, float value) {
    add(sum, bits.x, value);
    add(sum + VECTOR / 4, bits.y, value);
    add(sum + VECTOR / 2, bits.z, value);
    add(sum + 3 * VECTOR / 4, bits.w, value);
}

/* What is read by every block and again for the next token: the last to go from the cache. */
__device__ static inline float read_often(const float *from) {
    unsigned long long policy;
    float found;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    asm("ld.global.nc.L2::cache_hint.f32 %0, [%1], %2;" : "=f"(found) : "l"(from), "l"(policy));
    return found;
}

/* Grid (column blocks, CLUSTER). Shared memory: COLUMNS * (WARPS + 1) + SLICE floats, PASSES * THREADS halves.
   The least number of blocks leaves 64 registers a thread: with fewer, a row would be used before the next is asked for. */
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) __cluster_dims__(1, CLUSTER, 1)
    site(const element *x, const float *norm, const float *threshold, const unsigned char *dense, const element *weight,
         const element *bias, element *y, int in, int out) {
    extern __shared__ __align__(16) float memory[];
    float *total = memory, *part = total + COLUMNS, *value = part + WARPS * COLUMNS;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int first = blockIdx.y * SLICE, length = min(SLICE, in - first);
    half *list = (half *)(value + SLICE) + warp * PASSES * 32;
    float scale[PASSES], v[PASSES];

    arrive();
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int i = pass * THREADS + thread;
        scale[pass] = i < length ? read_often(norm + first + i) : 0.0f;
    }
    /* Nothing that an earlier kernel of a forward pass may have written is touched before this. */
    wait_for_inputs();
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int i = pass * THREADS + thread;
        v[pass] = i < length ? widen(x[first + i]) : 0.0f;
    }
    const float limit = dense && *dense ? -1.0f : *threshold;
    int count = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int i = pass * THREADS + thread;
        const bool keep = i < length && !(fabsf(v[pass]) * scale[pass] <= limit); /* a NaN is kept, so that it shows */
        const word kept = __ballot_sync(EVERY, keep);
        if (i < SLICE) value[i] = v[pass];
        if (keep) list[count + __popc(kept & ((1u << lane) - 1))] = (half)i;
        count += __popc(kept);
    }
    __syncwarp();

    /* Past the last output or row: the last one again, whose sum is not written, or times zero. */
    const int column = min(blockIdx.x * COLUMNS + lane % LANES * VECTOR, out - VECTOR);
    const element *rows = weight + (long long)first * out + column;
    float sum[VECTOR] = {};
    for (int i = 0; i < count; i += ROWS * UNROLL) {
        uint4 bits[UNROLL];
        float times[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int at = i + u * ROWS + lane / LANES, k = list[min(at, count - 1)];
            times[u] = at < count ? value[k] : 0.0f;
            bits[u] = read_once(rows + (long long)k * out);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) add_all(sum, bits[u], times[u]);
    }

    /* The sums of a warp's rows, of the block's warps, of the cluster's blocks. */
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) sum[i] += __shfl_xor_sync(EVERY, sum[i], step);
    if (lane < LANES)
#pragma unroll
        for (int i = 0; i < VECTOR; i += 4)
            *(float4 *)(part + warp * COLUMNS + lane * VECTOR + i) = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
    __syncthreads();
    await(); /* the others have begun, so that their memory can be written */
    for (int i = thread; i < COLUMNS; i += THREADS) {
        float found = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) found += part[w * COLUMNS + i];
        give(total + blockIdx.y * SHARE + i % SHARE, i / SHARE, found);
    }
    arrive();
    await();
    /* The next kernel may start. Any earlier, its blocks would crowd where this one's end first. */
    let_next_start();
    for (int i = thread; i < SHARE; i += THREADS) {
        const int at = blockIdx.x * COLUMNS + blockIdx.y * SHARE + i;
        float found = 0.0f;
#pragma unroll
        for (int block = 0; block < CLUSTER; block++) found += total[block * SHARE + i];
        if (at < out) y[at] = narrow(bias ? found + widen(bias[at]) : found);
    }
}
