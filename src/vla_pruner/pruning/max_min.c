/* Greedy max-min search (Algorithm 1), compiled on first use by native.py.
 *
 * Features are rows of 32-bit words: one fp32 number each, divided by the row's length before it is
 * multiplied, or two bf16 numbers where the processor multiplies those (their products are exact,
 * their sums fp32; lengths divide the sums). Only the lower triangle of the Gram matrix is computed,
 * in tiles of ROWS x COLUMNS that stay in registers. Every sum runs over the words in ascending
 * order, so neither the tiles nor the number of threads change it.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12
#elif defined(__AVX__)
#define LANES 8
#define ROWS 6
#else
#define LANES 4
#define ROWS 4
#endif
#define COLUMNS (2 * LANES)
#define DEPTH 128               /* words added up at once, as MKL does: the same rounding */
#define SHORTEST 1e-12f         /* see native.lengths */
#define SMALL (1L << 21)        /* multiplications that are not worth a second thread */

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));

/* A square of LANES x LANES words. */
static void transpose(const uint32_t *from, long from_stride, uint32_t *to, long to_stride)
{
#ifdef __clang__                /* knows shuffles by constants only */
    for (int row = 0; row < LANES; row++)
        for (int column = 0; column < LANES; column++)
            to[column * to_stride + row] = from[row * from_stride + column];
#else
    words v[LANES];
    for (int i = 0; i < LANES; i++) memcpy(&v[i], from + i * from_stride, sizeof v[i]);
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
    for (int i = 0; i < LANES; i++) memcpy(to + i * to_stride, &v[i], sizeof v[i]);
#endif
}

static void divide(const uint32_t *from, float length, uint32_t *to, long count)
{
    for (long i = 0; i < count; i++) {
        float x;
        memcpy(&x, from + i, sizeof x);
        x /= length;
        memcpy(to + i, &x, sizeof x);
    }
}

static inline void add(float *to, floats sum)
{
    floats old;
    memcpy(&old, to, sizeof old);
    old += sum;
    memcpy(to, &old, sizeof old);
}

/* Adds products of ROWS rows [ROWS][DEPTH] and COLUMNS columns [depth][COLUMNS] to a tile. */
#define PRODUCT(NAME, MULTIPLY_ADD)                                                                \
    static void NAME(const uint32_t *rows, const uint32_t *columns, long depth, float *tile,       \
                     long stride)                                                                  \
    {                                                                                              \
        floats sum[ROWS][2];                                                                       \
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = (floats){0}; \
        for (long w = 0; w < depth; w++) {                                                         \
            words left, right;                                                                     \
            memcpy(&left, columns + w * COLUMNS, sizeof left);                                     \
            memcpy(&right, columns + w * COLUMNS + LANES, sizeof right);                           \
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                              \
                words row = (words){0} + rows[r * DEPTH + w];                                      \
                sum[r][0] = MULTIPLY_ADD(row, left, sum[r][0]);                                    \
                sum[r][1] = MULTIPLY_ADD(row, right, sum[r][1]);                                   \
            }                                                                                      \
        }                                                                                          \
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                                  \
            add(tile + r * stride, sum[r][0]);                                                     \
            add(tile + r * stride + LANES, sum[r][1]);                                             \
        }                                                                                          \
    }

#define FP32(a, b, sum) ((floats)(a) * (floats)(b) + (sum))
PRODUCT(product_fp32, FP32)
#ifdef __AVX512BF16__
#define BF16(a, b, sum) ((floats)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)(a), (__m512bh)(b)))
PRODUCT(product_bf16, BF16)
int reads_bf16(void) { return 1; }
#else
#define product_bf16 product_fp32
int reads_bf16(void) { return 0; }
#endif

/* Turns a row of cosines (of products, where lengths are given) into distances; what it returns
 * decides the first token. */
static float finish(float *row, const float *length, long n, long self, int nearest)
{
    float least = INFINITY, second = INFINITY;
    if (length)
        for (long j = 0; j < n; j++) row[j] /= length[self] * length[j];
    for (long j = 0; j < n; j++) row[j] = 1.0f - row[j];
    row[self] = INFINITY;
    for (long j = 0; j < n; j++) {
        float larger = row[j] > least ? row[j] : least;
        second = larger < second ? larger : second;
        least = row[j] < least ? row[j] : least;
    }
    return nearest || n == 1 ? least : second;
}

static long argmax(const float *x, long n)
{
    float most = x[0];
    long first = 0;
    for (long i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    while (first < n - 1 && x[first] != most) first++;
    return first;
}

static long panels(long n) { return (n + COLUMNS - 1) / COLUMNS; }

/* How many words of memory a search among n rows needs. */
long memory_words(long n)
{
    long padded = panels(n) * COLUMNS, all = padded + ROWS;
    return all * DEPTH + padded * DEPTH + all * padded + n;
}

/* features: rows of `width` words, `stride` words apart; index [n]: the rows to choose from; length:
 * of each of these, read for fp32 and written for bf16; memory: see above; picks [k]: where in
 * `index` the chosen ones stand, in the order picked, if all lengths are finite. */
void max_min_search(const uint32_t *features, const int64_t *index, float *length, long n,
                    long width, long stride, int bf16, long k, int nearest, int threads,
                    uint32_t *memory, int64_t *picks)
{
    long padded = panels(n) * COLUMNS, all = padded + ROWS;
    uint32_t *rows = memory, *columns = rows + all * DEPTH;
    float *distance = (float *)(columns + padded * DEPTH), *score = distance + all * padded;

#pragma omp parallel num_threads(threads) if (n * n * width > SMALL)
    {
#pragma omp for schedule(static)
        for (long i = 0; i < all; i++) {
            memset(distance + i * padded, 0, padded * sizeof *distance);
            if (i >= n) memset(rows + i * DEPTH, 0, DEPTH * sizeof *rows);
        }
        for (long done = 0; done < width; done += DEPTH) {
            long depth = width - done < DEPTH ? width - done : DEPTH;
#pragma omp for schedule(static)
            for (long start = 0; start < padded; start += LANES) {
                uint32_t *panel = columns + start / COLUMNS * COLUMNS * DEPTH + start % COLUMNS;
                for (long i = start; i < n && i < start + LANES; i++) {
                    const uint32_t *from = features + index[i] * stride + done;
                    if (bf16)
                        memcpy(rows + i * DEPTH, from, depth * sizeof *rows);
                    else
                        divide(from, length[i], rows + i * DEPTH, depth);
                }
                for (long w = 0; w < depth; w += LANES)
                    transpose(rows + start * DEPTH + w, DEPTH, panel + w * COLUMNS, COLUMNS);
            }
#pragma omp for schedule(dynamic)
            for (long start = 0; start < padded; start += COLUMNS)
                for (long i = start; i < n; i += ROWS)
                    (bf16 ? product_bf16 : product_fp32)(rows + i * DEPTH, columns + start * DEPTH,
                                                         depth, distance + i * padded + start,
                                                         padded);
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < padded; i += LANES)
            for (long j = 0; j < i; j += LANES)
                transpose((uint32_t *)distance + i * padded + j, padded,
                          (uint32_t *)distance + j * padded + i, padded);
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++)
            if (bf16) {
                length[i] = sqrtf(distance[i * padded + i]);
                if (length[i] < SHORTEST) length[i] = SHORTEST;
            }
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++)
            score[i] = finish(distance + i * padded, bf16 ? length : 0, n, i, nearest);
    }

    picks[0] = argmax(score, n);
    for (long i = 0; i < n; i++) score[i] = INFINITY;   /* from now on: to the nearest chosen one */
    for (long step = 1; step < k; step++) {
        const float *row = distance + picks[step - 1] * padded;
        for (long i = 0; i < n; i++) score[i] = row[i] < score[i] ? row[i] : score[i];
        score[picks[step - 1]] = -INFINITY;
        picks[step] = argmax(score, n);
    }
}
