/* Products of many rows at once, kept in vectors: what max_min.c and column_mean.c share.
 *
 * Rows are 32-bit words: one fp32 number each, or two bf16 numbers where the processor multiplies
 * those (their products are exact, their sums fp32). They are stored in panels of COLUMNS rows,
 * [word][COLUMNS], and multiplied in tiles of ROWS x COLUMNS that fill the registers. Every sum runs
 * over the words in ascending order, so that neither tiles nor threads change it.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#define WIDE 2
#elif defined(__AVX__)
#define LANES 8
#define ROWS 4
#define WIDE 3
#else
#define LANES 4
#define ROWS 4
#define WIDE 2
#endif
#define COLUMNS (WIDE * LANES)  /* a panel: a multiple of ROWS */

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));

/* A square of LANES x LANES words, in place. */
static inline void transpose(words *v)
{
#ifdef __clang__                /* knows shuffles by constants only */
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            uint32_t word = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = word;
        }
#else
#pragma GCC unroll 4
    for (int half = 1; half < LANES; half *= 2) {       /* exchange squares of half x half */
        words low, high;
        for (uint32_t lane = 0; lane < LANES; lane++) {
            low[lane] = lane & half ? LANES + lane - half : lane;
            high[lane] = lane & half ? LANES + lane : lane + half;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & half)) {
                words upper = v[i], lower = v[i + half];
                v[i] = __builtin_shuffle(upper, lower, low);
                v[i + half] = __builtin_shuffle(upper, lower, high);
            }
    }
#endif
}

/* Stores `depth` words of LANES rows side by side, with COLUMNS words from one to the next; fp32 is
 * divided by the length of its row, if there are lengths. Rows that are NULL are zero. */
static void pack(const uint32_t *const *rows, const float *length, long depth, uint32_t *panel)
{
    for (long w = 0; w < depth; w += LANES) {
        long count = depth - w < LANES ? depth - w : LANES;
        words v[LANES];
        for (int i = 0; i < LANES; i++) {
            v[i] = (words){0};
            if (!rows[i]) continue;
            if (count == LANES)
                memcpy(&v[i], rows[i] + w, sizeof v[i]);
            else
                memcpy(&v[i], rows[i] + w, count * sizeof **rows);
            if (length) v[i] = (words)((floats)v[i] / length[i]);
        }
        transpose(v);
        for (int i = 0; i < count; i++) memcpy(panel + (w + i) * COLUMNS, &v[i], sizeof v[i]);
    }
}

static inline void add(float *to, floats sum)
{
    floats old;
    memcpy(&old, to, sizeof old);
    old += sum;
    memcpy(to, &old, sizeof old);
}

static inline void put(float *to, floats sum) { memcpy(to, &sum, sizeof sum); }

/* Gives to a tile (or adds to it) the products of ROWS rows of one panel and all COLUMNS of another. */
#define PRODUCT(NAME, MULTIPLY_ADD, GIVE)                                                          \
    static inline void NAME(const uint32_t *rows, const uint32_t *columns, long depth,             \
                            float *tile, long stride)                                              \
    {                                                                                              \
        floats sum[ROWS][WIDE];                                                                    \
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++)                                    \
            _Pragma("GCC unroll 4") for (int c = 0; c < WIDE; c++) sum[r][c] = (floats){0};        \
        for (long w = 0; w < depth; w++) {                                                         \
            words column[WIDE];                                                                    \
            _Pragma("GCC unroll 4") for (int c = 0; c < WIDE; c++)                                 \
                memcpy(&column[c], columns + w * COLUMNS + c * LANES, sizeof *column);             \
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                              \
                words row = (words){0} + rows[w * COLUMNS + r];                                    \
                _Pragma("GCC unroll 4") for (int c = 0; c < WIDE; c++)                             \
                    sum[r][c] = MULTIPLY_ADD(row, column[c], sum[r][c]);                           \
            }                                                                                      \
        }                                                                                          \
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++)                                    \
            _Pragma("GCC unroll 4") for (int c = 0; c < WIDE; c++)                                 \
                GIVE(tile + r * stride + c * LANES, sum[r][c]);                                    \
    }

#define FP32(a, b, sum) ((floats)(a) * (floats)(b) + (sum))
#ifdef __AVX512BF16__
#define BF16(a, b, sum) ((floats)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)(a), (__m512bh)(b)))
#else
#define BF16 FP32               /* nobody hands over pairs then: see reads_bf16 */
#endif
