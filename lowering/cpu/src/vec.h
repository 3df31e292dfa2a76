// Vectors of 32-bit lanes, by the extension that GCC and Clang share. What differs between the
// variants is the number of lanes and one instruction: the product of 16-bit pairs.
#pragma once

#include <cstdint>
#include <cstring>

#define SKV_EXPORT extern "C" __attribute__((visibility("default")))

namespace skv {

#if defined(SKV_PORTABLE)
constexpr int LANES = 4;
#elif defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
#error "compile with -DSKV_PORTABLE, or for AVX2 or AVX-512"
#endif

typedef float F32 __attribute__((vector_size(4 * LANES)));
typedef int32_t I32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t U32 __attribute__((vector_size(4 * LANES)));

// Four query rows.
typedef float Row32 __attribute__((vector_size(16)));
typedef int32_t IRow32 __attribute__((vector_size(16)));
typedef uint32_t URow32 __attribute__((vector_size(16)));

constexpr float NONE = -__builtin_inff();  // the logit of what is not seen
constexpr float LOG2E = 1.4426950408889634f;

static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename V, typename T>
static inline V load(const T* p) {
  V v;
  static_assert(sizeof(T) == 4, "32-bit lanes");
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
static inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

static inline F32 splat(float x) { return x - F32{}; }
static inline I32 splat(int32_t x) { return x - I32{}; }
static inline U32 splat(uint32_t x) { return x - U32{}; }

static inline F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
static inline I32 to_int(F32 x) { return __builtin_convertvector(x, I32); }
static inline F32 as_float(I32 x) { return (F32)x; }

static inline F32 max(F32 a, F32 b) { return a > b ? a : b; }

// The lanes of x, put together to four by ``join``.
template <typename Four, typename V, typename Join>
static inline Four quarter(V x, Join join) {
  Four part[LANES / 4];
  std::memcpy(part, &x, sizeof x);
#pragma GCC unroll 2
  for (int n = LANES / 8; n > 0; n /= 2)
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) part[i] = join(part[i], part[i + n]);
  return part[0];
}

static inline Row32 quarter(F32 x) {
  return quarter<Row32>(x, [](Row32 a, Row32 b) { return a + b; });
}

static inline float sum(F32 x) {
  const Row32 y = quarter(x);
  return (y[0] + y[2]) + (y[1] + y[3]);
}

static inline int32_t sum(I32 x) {
  const IRow32 y = quarter<IRow32>(x, [](IRow32 a, IRow32 b) { return a + b; });
  return (y[0] + y[2]) + (y[1] + y[3]);
}

static inline float max_of(F32 x) {
  const Row32 y = quarter<Row32>(x, [](Row32 a, Row32 b) { return a > b ? a : b; });
  const float even = y[0] > y[2] ? y[0] : y[2], odd = y[1] > y[3] ? y[1] : y[3];
  return even > odd ? even : odd;
}

// The sums of four vectors.
static inline Row32 sums(F32 a, F32 b, F32 c, F32 d) {
  const Row32 w = quarter(a), x = quarter(b), y = quarter(c), z = quarter(d);
  const Row32 wx =
      __builtin_shufflevector(w, x, 0, 4, 1, 5) + __builtin_shufflevector(w, x, 2, 6, 3, 7);
  const Row32 yz =
      __builtin_shufflevector(y, z, 0, 4, 1, 5) + __builtin_shufflevector(y, z, 2, 6, 3, 7);
  return __builtin_shufflevector(wx, yz, 0, 1, 4, 5) + __builtin_shufflevector(wx, yz, 2, 3, 6, 7);
}

// acc + lo(a) * lo(b) + hi(a) * hi(b) of signed 16-bit halves; ``a`` holds digits, which are small.
// In assembly: the header of the intrinsics takes a second to read, and of plain additions the
// compiler makes trees that no registers hold.
static inline I32 madd(I32 acc, U32 a, I32 b) {
#if defined(SKV_PORTABLE)
  return acc + (I32)(a & 0xffff) * ((b << 16) >> 16) + (I32)(a >> 16) * (b >> 16);
#elif defined(__AVX512VNNI__)
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
#elif defined(__AVX512BW__)
  I32 sums;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "=&v"(sums) : "v"(a), "v"(b));
  return acc;
#else
  I32 sums;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(sums) : "x"(a), "x"(b));
  return acc;
#endif
}

// 2 ** x for x <= 0, to a few units in the last place; 2 ** -126 for what is less; of NaN NaN.
// A polynomial of 2 ** f on [-1/2, 1/2], fitted to the least relative error (2e-9 before rounding).
static inline F32 exp2_of(F32 x) {
  const F32 shifter = splat(12582912.0f);  // 1.5 * 2 ** 23: adding it rounds to a whole number
  const F32 least = splat(-126.0f);
  x = least > x ? least : x;
  const F32 n = (x + shifter) - shifter, f = x - n;
  F32 y = splat(1.5353361e-4f);
  y = y * f + splat(1.3398874e-3f);
  y = y * f + splat(9.6184369e-3f);
  y = y * f + splat(5.5503324e-2f);
  y = y * f + splat(2.4022648e-1f);
  y = y * f + splat(6.9314718e-1f);
  y = y * f + splat(1.0f);
  // The rounded sum ends in n: moved to where exponents are, and added to y's.
  return as_float((I32)y + ((I32)(x + shifter) << 23));
}

// ------------------------------------------------------------ elements of tensors

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

static inline float from_bfloat16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

static inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// By a product, so that subnormal numbers need no loop.
static inline float from_float16(uint16_t x) {
  uint32_t bits = (uint32_t)(x & 0x7fff) << 13;
  float out;
  std::memcpy(&out, &bits, 4);
  out *= 0x1p112f;
  std::memcpy(&bits, &out, 4);
  bits |= (x & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;  // infinite, or NaN
  bits |= (uint32_t)(x & 0x8000) << 16;
  std::memcpy(&out, &bits, 4);
  return out;
}

static inline uint16_t to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (rest < 0x38800000) {  // subnormal: adding 1/2 aligns it, and rounds to nearest even
    float y, half = 0.5f;
    std::memcpy(&y, &rest, 4);
    y += half;
    std::memcpy(&bits, &y, 4);
    return sign | (uint16_t)(bits - 0x3f000000);
  }
  rest += 0xfff + ((rest >> 13) & 1);
  return sign | (uint16_t)((rest - 0x38000000) >> 13);
}

// Elements [n] of a tensor as floats.
static inline void to_floats(const void* from, int64_t at, int64_t n, int64_t dtype, float* out) {
  if (dtype == FLOAT32) {
    std::memcpy(out, (const float*)from + at, 4 * n);
  } else if (dtype == BFLOAT16) {
    const uint16_t* x = (const uint16_t*)from + at;
    for (int64_t i = 0; i < n; i++) out[i] = from_bfloat16(x[i]);
  } else {
    const uint16_t* x = (const uint16_t*)from + at;
    for (int64_t i = 0; i < n; i++) out[i] = from_float16(x[i]);
  }
}

static inline void from_floats(const float* from, void* out, int64_t at, int64_t n, int64_t dtype) {
  if (dtype == FLOAT32) {
    std::memcpy((float*)out + at, from, 4 * n);
  } else {
    uint16_t* x = (uint16_t*)out + at;
    for (int64_t i = 0; i < n; i++)
      x[i] = dtype == BFLOAT16 ? to_bfloat16(from[i]) : to_float16(from[i]);
  }
}

// ``to`` [n, m], rows ``to_row`` apart, of ``from`` [m, n], rows ``from_row`` bytes apart: 32-bit
// elements, four by four where there are so many.
static inline void transpose(const void* from, int64_t from_row, int64_t m, int64_t n, void* to,
                             int64_t to_row) {
  typedef int32_t Four __attribute__((vector_size(16)));
  const uint8_t* source = (const uint8_t*)from;  // rows in bytes: they need not be aligned
  int32_t* target = (int32_t*)to;
  for (int64_t i = 0; i < m;) {
    if (i + 4 > m) {
      for (int64_t j = 0; j < n; j++)
        std::memcpy(target + j * to_row + i, source + i * from_row + 4 * j, 4);
      i++;
      continue;
    }
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
      Four x[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) std::memcpy(&x[r], source + (i + r) * from_row + 4 * j, 16);
      const Four low = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
      const Four high = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
      const Four low2 = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
      const Four high2 = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
      const Four rows[] = {__builtin_shufflevector(low, low2, 0, 1, 4, 5),
                           __builtin_shufflevector(low, low2, 2, 3, 6, 7),
                           __builtin_shufflevector(high, high2, 0, 1, 4, 5),
                           __builtin_shufflevector(high, high2, 2, 3, 6, 7)};
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) std::memcpy(target + (j + r) * to_row + i, &rows[r], 16);
    }
    for (; j < n; j++)
      for (int r = 0; r < 4; r++)
        std::memcpy(target + j * to_row + i + r, source + (i + r) * from_row + 4 * j, 4);
    i += 4;
  }
}

}  // namespace skv
