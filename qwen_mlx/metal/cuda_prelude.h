// Metal's names in CUDA, so that NVRTC compiles the same kernel bodies; metal_prelude.h is its twin.
#define FUNCTION __device__ __forceinline__
#define SIMD_WIDTH 32
#define UNROLL _Pragma("unroll")
#define threadgroup __shared__
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define thread_position_in_grid \
  make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, 0u)
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)

typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned short ushort;
static_assert(sizeof(ulong) == 8, "long has 64 bits in Metal");

namespace metal {
enum class mem_flags { mem_threadgroup };
FUNCTION void threadgroup_barrier(mem_flags) { __syncthreads(); }
FUNCTION float simd_sum(float x) {
  for (int step = 16; step > 0; step >>= 1) {
    x += __shfl_xor_sync(0xffffffffu, x, step);
  }
  return x;
}
FUNCTION float simd_max(float x) {
  for (int step = 16; step > 0; step >>= 1) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  }
  return x;
}
FUNCTION float simd_shuffle(float x, ushort lane) { return __shfl_sync(0xffffffffu, x, lane); }
FUNCTION float simd_shuffle_xor(float x, ushort mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// Intrinsics with a stated rounding: nothing that a compiler option could loosen.
FUNCTION float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FUNCTION float abs(float x) { return fabsf(x); }
FUNCTION float rint(float x) { return rintf(x); }
FUNCTION float min(float a, float b) { return fminf(a, b); }
FUNCTION float max(float a, float b) { return fmaxf(a, b); }
FUNCTION bool isfinite(float x) { return fabsf(x) < __int_as_float(0x7f800000); }
namespace precise {
FUNCTION float sqrt(float x) { return __fsqrt_rn(x); }
FUNCTION float exp(float x) { return expf(x); }
}
}

template <int N>
struct Pack {
  float v[N];
};

// One 16-byte access where N elements are 16 bytes and lie so: a slice of an array may start anywhere.
template <int N, typename T>
FUNCTION Pack<N> load(const T* from, uint index) {
  Pack<N> pack;
  const T* first = from + index;
  if (N * sizeof(T) == 16 && reinterpret_cast<size_t>(first) % 16 == 0) {
    const uint4 raw = *reinterpret_cast<const uint4*>(first);
    const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      pack.v[k] = float(elements[k % (16 / sizeof(T))]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      pack.v[k] = float(first[k]);
    }
  }
  return pack;
}

// An access of 4, 8 or 16 bytes, which CUDA makes one instruction.
template <int BYTES>
struct Bytes;
template <>
struct Bytes<4> {
  typedef uint type;
};
template <>
struct Bytes<8> {
  typedef uint2 type;
};
template <>
struct Bytes<16> {
  typedef uint4 type;
};

template <int N, bool ALIGNED, typename T>
FUNCTION Pack<N> load_aligned(const T* from, uint index) {
  if (!ALIGNED) {
    return load<N>(from, index);
  }
  typedef typename Bytes<N * sizeof(T)>::type Raw;
  const Raw raw = *reinterpret_cast<const Raw*>(from + index);
  const T* elements = reinterpret_cast<const T*>(&raw);
  Pack<N> pack;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    pack.v[k] = float(elements[k]);
  }
  return pack;
}

template <typename T>
FUNCTION bool is_aligned(const T* pointer) {
  return reinterpret_cast<size_t>(pointer) % 16 == 0;
}

template <int N>
struct Words {
  uint v[N];
};

template <int N, bool ALIGNED>
FUNCTION Words<N> load_words(const uint* from, uint index) {
  Words<N> words;
  if (ALIGNED && N % 4 == 0) {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      const uint4 raw = *reinterpret_cast<const uint4*>(from + index + k);
      words.v[k] = raw.x;
      words.v[(k + 1) % N] = raw.y;
      words.v[(k + 2) % N] = raw.z;
      words.v[(k + 3) % N] = raw.w;
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      words.v[k] = from[index + k];
    }
  }
  return words;
}

template <typename T, int N>
FUNCTION void store(T* to, uint index, Pack<N> pack) {
  T* first = to + index;
  if (N * sizeof(T) == 16 && reinterpret_cast<size_t>(first) % 16 == 0) {
    uint4 raw;
    T* elements = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      elements[k % (16 / sizeof(T))] = T(pack.v[k]);
    }
    *reinterpret_cast<uint4*>(first) = raw;
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      first[k] = T(pack.v[k]);
    }
  }
}

// One instruction; two constants would make it two.
FUNCTION uint masked_or(uint word, uint mask, uint bits) {
  uint result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

#define FETCHED 128u
template <typename T>
FUNCTION void prefetch(const T* from, uint index) {
  asm volatile("prefetch.global.L2 [%0];" : : "l"(from + index));
}

FUNCTION float float_of_bits(int bits) {
  return __int_as_float(bits);
}

FUNCTION float float_of_half(uint bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
