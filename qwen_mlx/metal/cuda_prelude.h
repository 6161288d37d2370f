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
enum class mem_flags { mem_none, mem_threadgroup };
FUNCTION void threadgroup_barrier(mem_flags) { __syncthreads(); }
FUNCTION void simdgroup_barrier(mem_flags) { __syncwarp(); }
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
FUNCTION uint simd_shuffle_xor(uint x, ushort mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
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

template <typename T>
struct IsBfloat {
  enum { value = 0 };
};
template <>
struct IsBfloat<__nv_bfloat16> {
  enum { value = 1 };
};

// Two numbers rounded to a T of 16 bits, in one instruction; alone each would take a slower one.
template <typename T>
FUNCTION uint rounded_pair(float low, float high) {
  uint pair;
  if (IsBfloat<T>::value) {
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(low, high);
    pair = *reinterpret_cast<const uint*>(&rounded);
  } else {
    const __half2 rounded = __floats2half2_rn(low, high);
    pair = *reinterpret_cast<const uint*>(&rounded);
  }
  return pair;
}

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

// An access of 2 to 16 bytes, which CUDA makes one instruction.
template <int BYTES>
struct Bytes;
template <>
struct Bytes<2> {
  typedef unsigned short type;
};
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

// Each element rounded to T, to nearest even.
template <typename T, int N>
FUNCTION Pack<N> rounded(Pack<N> pack) {
  if (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      const uint pair = rounded_pair<T>(pack.v[k], pack.v[(k + 1) % N]);
      const T* elements = reinterpret_cast<const T*>(&pair);
      pack.v[k] = float(elements[0]);
      pack.v[(k + 1) % N] = float(elements[1 % (4 / sizeof(T))]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      pack.v[k] = float(T(pack.v[k]));
    }
  }
  return pack;
}

// The sums of two pairs of T of 16 bits, each rounded, in one instruction.
template <typename T>
FUNCTION uint pair_sum(uint a, uint b) {
  uint pair;
  if (IsBfloat<T>::value) {
    const __nv_bfloat162 sum =
        __hadd2_rn(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    pair = *reinterpret_cast<const uint*>(&sum);
  } else {
    const __half2 sum = __hadd2_rn(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
    pair = *reinterpret_cast<const uint*>(&sum);
  }
  return pair;
}

// x[i] + y[j], ..., N sums, each rounded to T; x and y lie at multiples of 16 bytes if ALIGNED.
template <typename T, int N, bool ALIGNED>
FUNCTION Pack<N> rounded_sum(const T* x, uint i, const T* y, uint j) {
  Pack<N> sums;
  if (ALIGNED && N * sizeof(T) == 16 && sizeof(T) == 2) {
    const uint4 a = *reinterpret_cast<const uint4*>(x + i);
    const uint4 b = *reinterpret_cast<const uint4*>(y + j);
    const uint4 raw = make_uint4(pair_sum<T>(a.x, b.x), pair_sum<T>(a.y, b.y), pair_sum<T>(a.z, b.z), pair_sum<T>(a.w, b.w));
    const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      sums.v[k] = float(elements[k % (16 / sizeof(T))]);
    }
    return sums;
  }
  const Pack<N> a = load_aligned<N, ALIGNED>(x, i);
  const Pack<N> b = load_aligned<N, ALIGNED>(y, j);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    sums.v[k] = a.v[k] + b.v[k];
  }
  return rounded<T>(sums);
}

// Where `to` and index are known to lie at multiples of 16 bytes if N elements are 16 bytes.
template <typename T, int N>
FUNCTION void store_aligned(T* to, uint index, Pack<N> pack) {
  if (N * sizeof(T) == 16) {
    uint4 raw;
    uint* words = reinterpret_cast<uint*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      constexpr int STEP = N / 4 == 0 ? 1 : N / 4;
      const float low = pack.v[i * STEP % N];
      words[i] = sizeof(T) == 2 ? rounded_pair<T>(low, pack.v[(i * STEP + 1) % N]) : __float_as_uint(low);
    }
    *reinterpret_cast<uint4*>(to + index) = raw;
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      to[index + k] = T(pack.v[k]);
    }
  }
}

template <typename T, int N>
FUNCTION void store(T* to, uint index, Pack<N> pack) {
  T* first = to + index;
  if (N * sizeof(T) == 16 && reinterpret_cast<size_t>(first) % 16 == 0) {
    store_aligned<T>(to, index, pack);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      first[k] = T(pack.v[k]);
    }
  }
}

// 2 N elements of 16 bits, as they are.
template <int N, bool ALIGNED, typename T>
FUNCTION Words<N> load_halves(const T* from, uint index) {
  Words<N> words;
  if (ALIGNED) {
    typedef typename Bytes<N * 4>::type Raw;
    const Raw raw = *reinterpret_cast<const Raw*>(from + index);
    const uint* parts = reinterpret_cast<const uint*>(&raw);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      words.v[k] = parts[k];
    }
  } else {
    const unsigned short* halves = reinterpret_cast<const unsigned short*>(from + index);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      words.v[k] = uint(halves[2 * k]) | (uint(halves[2 * k + 1]) << 16);
    }
  }
  return words;
}

// Element k of those from word `at` of threadgroup memory on.
template <typename T>
FUNCTION void put_element(uint* ring, uint at, uint k, const T* from, uint index) {
  reinterpret_cast<T*>(ring + at)[k] = from[index];
}

// Starts to copy N elements of 2 or 4 bytes to word `at` of threadgroup memory; 4 bytes or more lie at multiples of their size
// if ALIGNED, else they are copied at once.
template <int N, bool ALIGNED, typename T>
FUNCTION void start_copy(uint* ring, uint at, const T* from, uint index) {
  constexpr int BYTES = N * sizeof(T);
  if (ALIGNED) {
    const uint to = static_cast<uint>(__cvta_generic_to_shared(ring + at));
    if (BYTES == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from + index) : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from + index), "n"(BYTES == 8 ? 8 : 4)
                   : "memory");
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      put_element(ring, at, k, from, index + k);
    }
  }
}

FUNCTION void end_batch() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N>
FUNCTION void wait_for_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Element i of the Ts from word `at` on.
template <typename T>
struct Number {
  static FUNCTION float at(const uint* ring, uint from, uint i) {
    return float(reinterpret_cast<const T*>(ring + from)[i]);
  }
};

// One instruction each, which the compiler does not find by itself.
FUNCTION uint lower_halves(uint a, uint b) {
  return __byte_perm(a, b, 0x5410);
}
FUNCTION uint upper_halves(uint a, uint b) {
  return __byte_perm(a, b, 0x7632);
}

// sum + rows times columns for tiles of 16-bit numbers; see tiles.h for who holds what.
template <typename T>
FUNCTION Pack<4> tile_product(Pack<4> sum, Words<4> rows, Words<2> columns, uint) {
  if (IsBfloat<T>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum.v[0]), "+f"(sum.v[1]), "+f"(sum.v[2]), "+f"(sum.v[3])
        : "r"(rows.v[0]), "r"(rows.v[1]), "r"(rows.v[2]), "r"(rows.v[3]), "r"(columns.v[0]), "r"(columns.v[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum.v[0]), "+f"(sum.v[1]), "+f"(sum.v[2]), "+f"(sum.v[3])
        : "r"(rows.v[0]), "r"(rows.v[1]), "r"(rows.v[2]), "r"(rows.v[3]), "r"(columns.v[0]), "r"(columns.v[1]));
  }
  return sum;
}

// One instruction; two constants would make it two.
FUNCTION uint masked_or(uint word, uint mask, uint bits) {
  uint result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

FUNCTION float float_of_bits(int bits) {
  return __int_as_float(bits);
}

FUNCTION uint bits_of_float(float value) {
  return __float_as_uint(value);
}

FUNCTION float float_of_half(uint bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
