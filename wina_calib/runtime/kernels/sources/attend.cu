/* Attention of one new token: heads normed where they are, turned by rotary embedding, put into the cache, and attended to.

   A cluster of CLUSTER blocks computes the GROUP query heads of one key head; SIZE / 8 threads read a place of the cache at a
   time, UNROLL of them in flight, and keep a maximum, a sum and a weighted value each, which warps, blocks and the cluster
   merge at the end in a fixed order. Only places before the new token's are read, and of those only what the mask shows. Where the
   cache is full nothing is written, and the result is NaN, so that it shows.

   Compiled with TYPE 1 bfloat16, 2 float16; SIZE, GROUP, CLUSTER, WARPS, UNROLL; NORMS, MASKED. */

#define CLUSTERED 1
#define OVERLAP 1
#include "common.cuh"

#define THREADS (WARPS * 32)
#define LANES (SIZE / 8)
#define SPLIT (32 / LANES)
#define TEAMS (CLUSTER * WARPS * SPLIT)
#define WIDTH (GROUP * SIZE)
#define SHARE (WIDTH / CLUSTER)
#define NOTHING (-1e30f)

__device__ static inline float rounded(float value) { return widen(narrow(value)); }

/* Eight numbers of 16 bits. */
__device__ static inline void spread(float *to, uint4 bits) {
    const word words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int w = 0; w < 4; w++) to[2 * w] = widen((half)(words[w] & 0xffff)), to[2 * w + 1] = widen((half)(words[w] >> 16));
}
__device__ static inline uint4 packed(const float *from) {
    word words[4];
#pragma unroll
    for (int w = 0; w < 4; w++) words[w] = narrow(from[2 * w]) | (word)narrow(from[2 * w + 1]) << 16;
    return make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ static inline uint4 read(const element *from) { return *(const uint4 *)from; }

/* The sum over the threads that share a place. */
__device__ static inline float summed(float value) {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) value += __shfl_xor_sync(EVERY, value, step);
    return value;
}

/* This thread's part of a head, normed and turned: numbers `at` to before `at` + 8. */
__device__ static inline void turned(float *to, const element *head, const element *gain, float epsilon, const float *cosine,
                                     const float *sine, int at) {
    const int other = at ^ (SIZE / 2);
    float own[8], pair[8];
    spread(own, read(head + at));
    spread(pair, read(head + other));
#if NORMS
    float squares = 0.0f, g[8], h[8];
#pragma unroll
    for (int i = 0; i < 8; i++) squares += own[i] * own[i];
    const float inverse = rsqrtf(summed(squares) / SIZE + epsilon);
    spread(g, read(gain + at));
    spread(h, read(gain + other));
#pragma unroll
    for (int i = 0; i < 8; i++) own[i] = rounded(g[i] * rounded(own[i] * inverse)), pair[i] = rounded(h[i] * rounded(pair[i] * inverse));
#endif
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = rounded(own[i] * cosine[i] + (at < SIZE / 2 ? -pair[i] : pair[i]) * sine[i]);
}

/* Grid (CLUSTER, key heads). heads (GROUP query heads a key head, key heads, value heads) of SIZE; cosine and sine (SIZE);
   keys and values (key heads, length, SIZE); position (), of the new token; mask (length). */
extern "C" __global__ void __launch_bounds__(THREADS) __cluster_dims__(CLUSTER, 1, 1)
    attend(const element *heads, const element *cosines, const element *sines, const element *query_gain, const element *key_gain,
           element *keys, element *values, const long long *position, const byte *mask, element *y, int length, int epsilon_bits,
           int scale_bits) {
    __shared__ __align__(16) float sums[WARPS][WIDTH];
    __shared__ float tops[WARPS][GROUP], totals[WARPS][GROUP];
    __shared__ float all_sums[CLUSTER][SHARE], all_tops[CLUSTER][GROUP], all_totals[CLUSTER][GROUP];
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, rank = blockIdx.x, head = blockIdx.y;
    const int at = lane % LANES * 8, team = (rank * WARPS + warp) * SPLIT + lane / LANES;
    const float scale = __int_as_float(scale_bits), epsilon = __int_as_float(epsilon_bits);
    arrive();
    wait_for_inputs();
    let_next_start();

    const bool full = (unsigned long long)*position >= (unsigned long long)length;
    const int now = full ? 0 : (int)*position;
    float c[8], s[8], query[GROUP][8];
    spread(c, read(cosines + at));
    spread(s, read(sines + at));
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        turned(query[g], heads + (head * GROUP + g) * SIZE, query_gain, epsilon, c, s, at);
#pragma unroll
        for (int i = 0; i < 8; i++) query[g][i] *= full ? __int_as_float(0x7fc00000) : scale;
    }
    element *own_keys = keys + (long long)head * length * SIZE + at, *own_values = values + (long long)head * length * SIZE + at;
    float top[GROUP], total[GROUP], sum[GROUP][8];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        top[g] = NOTHING, total[g] = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) sum[g][i] = 0.0f;
    }
    if (rank == CLUSTER - 1 && warp == WARPS - 1) { /* the new token, by the threads that have the least to read */
        float key[8], value[8];
        turned(key, heads + (gridDim.y * GROUP + head) * SIZE, key_gain, epsilon, c, s, at);
        const uint4 bits = read(heads + (gridDim.y * (GROUP + 1) + head) * SIZE + at);
        spread(value, bits);
        const bool mine = lane / LANES == SPLIT - 1;
        if (mine && !full) {
            *(uint4 *)(own_keys + (long long)now * SIZE) = packed(key);
            *(uint4 *)(own_values + (long long)now * SIZE) = bits;
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float score = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) score += query[g][i] * key[i];
            score = summed(score);
            if (!mine) continue;
            top[g] = score, total[g] = 1.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) sum[g][i] = value[i];
        }
    }
    for (int first = team / SPLIT * SPLIT; first < now; first += TEAMS * UNROLL) { /* the same for a warp */
        uint4 key[UNROLL], value[UNROLL];
        bool seen[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int place = first + lane / LANES + u * TEAMS;
            seen[u] = place < now;
            key[u] = value[u] = make_uint4(0, 0, 0, 0);
            if (seen[u]) {
                key[u] = read(own_keys + (long long)place * SIZE);
                value[u] = read(own_values + (long long)place * SIZE);
#if MASKED
                seen[u] = mask[place];
#endif
            }
        }
        float score[GROUP][UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float k[8];
            spread(k, key[u]);
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float found = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; i++) found += query[g][i] * k[i];
                score[g][u] = found;
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const float found = summed(score[g][u]);
                score[g][u] = seen[u] ? found : NOTHING;
            }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float above = top[g];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) above = fmaxf(above, score[g][u]);
            const float before = __expf(top[g] - above);
            total[g] *= before;
#pragma unroll
            for (int i = 0; i < 8; i++) sum[g][i] *= before;
            top[g] = above;
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                score[g][u] = seen[u] ? __expf(score[g][u] - above) : 0.0f;
                total[g] += score[g][u];
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            float v[8];
            spread(v, value[u]);
#pragma unroll
            for (int g = 0; g < GROUP; g++)
#pragma unroll
                for (int i = 0; i < 8; i++) sum[g][i] += score[g][u] * v[i];
        }
    }
    /* The parts of a warp, of the block's warps, of the cluster's blocks. */
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        float above = top[g];
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) above = fmaxf(above, __shfl_xor_sync(EVERY, above, step));
        const float before = __expf(top[g] - above);
        total[g] *= before;
#pragma unroll
        for (int i = 0; i < 8; i++) sum[g][i] *= before;
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) {
            total[g] += __shfl_xor_sync(EVERY, total[g], step);
#pragma unroll
            for (int i = 0; i < 8; i++) sum[g][i] += __shfl_xor_sync(EVERY, sum[g][i], step);
        }
        if (lane < LANES) {
            float4 *to = (float4 *)(sums[warp] + g * SIZE + at);
            to[0] = make_float4(sum[g][0], sum[g][1], sum[g][2], sum[g][3]);
            to[1] = make_float4(sum[g][4], sum[g][5], sum[g][6], sum[g][7]);
        }
        if (lane == 0) tops[warp][g] = above, totals[warp][g] = total[g];
    }
    __syncthreads();
    await(); /* the others have begun: their memory can be written */
    for (int i = thread; i < WIDTH; i += THREADS) {
        const int g = i / SIZE;
        float above = NOTHING, found = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) above = fmaxf(above, tops[w][g]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) found += sums[w][i] * __expf(tops[w][g] - above);
        give(&all_sums[rank][i % SHARE], i / SHARE, found);
    }
    if (thread < GROUP * CLUSTER) {
        const int g = thread % GROUP, to = thread / GROUP;
        float above = NOTHING, found = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) above = fmaxf(above, tops[w][g]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) found += totals[w][g] * __expf(tops[w][g] - above);
        give(&all_tops[rank][g], to, above);
        give(&all_totals[rank][g], to, found);
    }
    arrive();
    await();
    for (int i = thread; i < SHARE; i += THREADS) {
        const int place = rank * SHARE + i, g = place / SIZE;
        float above = NOTHING, found = 0.0f, of_all = 0.0f;
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) above = fmaxf(above, all_tops[b][g]);
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) {
            const float share = __expf(all_tops[b][g] - above);
            found += all_sums[b][i] * share;
            of_all += all_totals[b][g] * share;
        }
        y[head * WIDTH + place] = narrow(found / of_all);
    }
}
