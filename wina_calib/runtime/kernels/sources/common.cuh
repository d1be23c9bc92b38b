/* What the kernels share: numbers of TYPE 0 float32, 1 bfloat16, 2 float16; blocks of a cluster; kernels that overlap. */

typedef unsigned int word;
typedef unsigned short half;
typedef unsigned char byte;

#if TYPE == 0
typedef float element;
#else
typedef half element;
#endif

#define EVERY 0xffffffffu

__device__ static inline float from_half(half value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
}

__device__ static inline half to_half(float value) {
    half found;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(found) : "f"(value));
    return found;
}

__device__ static inline float widen(element value) {
#if TYPE == 0
    return value;
#elif TYPE == 1
    return __uint_as_float((word)value << 16);
#else
    return from_half(value);
#endif
}

__device__ static inline element narrow(float value) {
#if TYPE == 0
    return value;
#elif TYPE == 1
    element found;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(found) : "f"(value));
    return found;
#else
    return to_half(value);
#endif
}

/* 16 bytes that are read once: they are not kept in the first cache. */
__device__ static inline uint4 read_once(const void *from) {
    uint4 found;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
        : "l"(from));
    return found;
}

/* Nothing that an earlier kernel of a forward pass may have written is touched before `wait_for_inputs`. */
__device__ static inline void wait_for_inputs() {
#if OVERLAP
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ static inline void let_next_start() {
#if OVERLAP
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#ifdef CLUSTER
/* The blocks of a cluster wait for each other: all that was written before `arrive` is seen after `await`. */
__device__ static inline void arrive() {
#if CLUSTERED
    if (CLUSTER > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ static inline void await() {
#if CLUSTERED
    if (CLUSTER > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    else __syncthreads();
#endif
}

/* Write to the place of `own` in the shared memory of a block of the cluster. */
__device__ static inline void give(float *own, word block, float value) {
#if CLUSTERED && CLUSTER > 1
    const word address = (word)__cvta_generic_to_shared(own);
    word there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
#else
    *own = value;
#endif
}
#endif
