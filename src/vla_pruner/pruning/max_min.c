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
#define ROWS 8
#elif defined(__AVX__)
#define LANES 8
#define ROWS 4
#else
#define LANES 4
#define ROWS 4
#endif
#define COLUMNS (2 * LANES)     /* a panel: a multiple of ROWS */
#define DEPTH 128               /* words added up at once, as MKL does: the same rounding */
#define SHORTEST 1e-12f         /* see native.lengths */
#define SMALL (1L << 21)        /* multiplications that are not worth a second thread */

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
 * divided by the length of its row. Rows that are NULL are zero. */
static void pack(const uint32_t *const *rows, const float *length, int bf16, long depth,
                 uint32_t *panel)
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
            if (!bf16) v[i] = (words)((floats)v[i] / length[i]);
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

/* Adds to a tile the products of ROWS tokens of one panel and all COLUMNS of another, both stored
 * [depth][COLUMNS]. */
#define PRODUCT(NAME, MULTIPLY_ADD)                                                                \
    static void NAME(const uint32_t *rows, const uint32_t *columns, long depth, float *tile,       \
                     long stride)                                                                  \
    {                                                                                              \
        floats sum[ROWS][2];                                                                       \
        _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++)                                    \
            sum[r][0] = sum[r][1] = (floats){0};                                                   \
        for (long w = 0; w < depth; w++) {                                                         \
            words left, right;                                                                     \
            memcpy(&left, columns + w * COLUMNS, sizeof left);                                     \
            memcpy(&right, columns + w * COLUMNS + LANES, sizeof right);                           \
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                              \
                words row = (words){0} + rows[w * COLUMNS + r];                                    \
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

static long whole_panels(long n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* How many words of memory a search among n rows needs. */
long memory_words(long n)
{
    long all = whole_panels(n);
    return all * DEPTH + all * all + all;
}

/* features: `rows` rows of `width` words, `stride` words apart; index [n]: those to choose from;
 * length: of each of these, read for fp32 and written for bf16; memory: see above; picks [k]: where
 * in `index` the chosen ones stand, in the order picked, if all lengths are finite. Returns 1; 0, with
 * nothing read or written, if k or an index is out of range. */
int max_min_search(const uint32_t *features, const int64_t *index, float *length, long rows, long n,
                   long width, long stride, int bf16, long k, int nearest, int threads,
                   uint32_t *memory, int64_t *picks)
{
    if (k < 1 || k > n || width < 0 || threads < 1) return 0;
    for (long i = 0; i < n; i++)
        if (index[i] < 0 || index[i] >= rows) return 0;

    long all = whole_panels(n);
    uint32_t *panels = memory;
    float *distance = (float *)(panels + all * DEPTH), *score = distance + all * all;

#pragma omp parallel num_threads(threads) if (n * n * width > SMALL)
    {
#pragma omp for schedule(static)
        for (long i = 0; i < all; i++) memset(distance + i * all, 0, all * sizeof *distance);
        for (long done = 0; done < width; done += DEPTH) {
            long depth = width - done < DEPTH ? width - done : DEPTH;
#pragma omp for schedule(static)
            for (long start = 0; start < all; start += LANES) {
                const uint32_t *lane[LANES];
                for (long i = 0; i < LANES; i++)
                    lane[i] = start + i < n ? features + index[start + i] * stride + done : 0;
                pack(lane, length + start, bf16, depth,
                     panels + start / COLUMNS * COLUMNS * DEPTH + start % COLUMNS);
            }
#pragma omp for schedule(dynamic)
            for (long j = 0; j < all; j += COLUMNS)
                for (long i = j; i < all; i += ROWS)
                    (bf16 ? product_bf16 : product_fp32)(
                        panels + i / COLUMNS * COLUMNS * DEPTH + i % COLUMNS, panels + j * DEPTH,
                        depth, distance + i * all + j, all);
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < all; i += LANES)               /* the upper triangle */
            for (long j = 0; j < i; j += LANES) {
                words v[LANES];
                for (int r = 0; r < LANES; r++)
                    memcpy(&v[r], distance + (i + r) * all + j, sizeof v[r]);
                transpose(v);
                for (int r = 0; r < LANES; r++)
                    memcpy(distance + (j + r) * all + i, &v[r], sizeof v[r]);
            }
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++)
            if (bf16) {
                length[i] = sqrtf(distance[i * all + i]);
                if (length[i] < SHORTEST) length[i] = SHORTEST;
            }
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++)
            score[i] = finish(distance + i * all, bf16 ? length : 0, n, i, nearest);
    }

    picks[0] = argmax(score, n);
    for (long i = 0; i < n; i++) score[i] = INFINITY;   /* from now on: to the nearest chosen one */
    for (long step = 1; step < k; step++) {
        const float *row = distance + picks[step - 1] * all;
        for (long i = 0; i < n; i++) score[i] = row[i] < score[i] ? row[i] : score[i];
        score[picks[step - 1]] = -INFINITY;
        picks[step] = argmax(score, n);
    }
    return 1;
}
