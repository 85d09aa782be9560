/* Greedy max-min search (Algorithm 1), alone and among the best of two scores (Algorithm 2): native.py
 * compiles it.
 *
 * fp32 features are divided by their length before they are multiplied; where pairs of bf16 numbers
 * are, lengths divide the sums. Only the lower triangle of the Gram matrix is computed.
 */
#include "lanes.h"

#define DEPTH 128               /* words added up at once, as MKL does: the same rounding */
#define SHORTEST 1e-12f         /* see native.lengths */
#define SMALL (1L << 21)        /* multiplications that are not worth a second thread */

PRODUCT(product_fp32, FP32, add)
PRODUCT(product_bf16, BF16, add)

int reads_bf16(void)
{
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

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

static float no_shorter(float length) { return length < SHORTEST ? SHORTEST : length; }

/* How many words of memory a search among n rows needs. */
long memory_words(long n)
{
    long all = whole_panels(n);
    return all * DEPTH + all * all + all;
}

/* features: `rows` rows of `width` words, `stride` words apart; index [n]: those to choose from;
 * length [n]: theirs, read for fp32 and written for bf16; memory: see above; picks [k]: where in
 * `index` the chosen ones stand, in the order picked, if all lengths are finite. Returns 1; 0, with
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
                pack(lane, bf16 ? 0 : length + start, depth,
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
            if (bf16) length[i] = no_shorter(sqrtf(distance[i * all + i]));
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

/* A number that is ordered as x is, which is not NaN. */
static inline uint32_t rank_of(float x)
{
    uint32_t bits;
    x += 0.0f;                  /* -0 is 0 */
    memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

/* Counts a vote for the k largest of n scores, the first ones of those that are equal; what is not
 * valid comes last. Returns 0 if a score is NaN. */
static int vote_for_best(const float *score, const uint8_t *valid, long n, long k, uint32_t *rank,
                         uint8_t *votes)
{
    uint32_t least = 0;
    long above = 0, equal = 0;
    for (long i = 0; i < n; i++) {
        float x = valid && !valid[i] ? -INFINITY : score[i];
        if (x != x) return 0;
        rank[i] = rank_of(x);
    }
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {     /* the k-th largest, bit by bit */
        long count = 0;
        for (long i = 0; i < n; i++) count += rank[i] >= (least | bit);
        if (count >= k) least |= bit;
    }
    for (long i = 0; i < n; i++) above += rank[i] > least;
    for (long i = 0; i < n; i++)
        if (rank[i] > least || (rank[i] == least && equal++ < k - above)) votes[i]++;
    return 1;
}

/* Words of memory for the two functions below, among n rows. */
long choice_words(long n, long k)
{
    long most = 2 * k < n ? 2 * k : n;
    return memory_words(most) + 2 * most + most + 2 * k + n + (n + 3) / 4;
}

/* The k largest of n scores, ascending: picks [k]. Returns 1; 0 for a k out of range, -1 for NaN. */
int top_k(const float *score, const uint8_t *valid, long n, long k, uint32_t *memory,
          int64_t *picks)
{
    if (k < 1 || k > n) return 0;
    uint8_t *votes = (uint8_t *)(memory + n);
    memset(votes, 0, n);
    if (!vote_for_best(score, valid, n, k, memory, votes)) return -1;
    for (long i = 0, found = 0; i < n; i++)
        if (votes[i]) picks[found++] = i;
    return 1;
}

/* Algorithm 2: of the k best of both scores, the k least alike, ascending. `valid` may be NULL; `own`
 * [n] are the lengths of fp32 features; what else there is: see max_min_search. Returns 1; 0 for a k out of range, -1 for scores that are NaN,
 * -2 for features that are not finite. */
int combine_then_filter(const float *semantic, const float *action, const uint8_t *valid,
                        const uint32_t *features, const float *own, long n, long width, long stride, int bf16, long k,
                        int nearest, int threads, uint32_t *memory, int64_t *picks)
{
    if (k < 1 || k > n) return 0;
    long most = 2 * k < n ? 2 * k : n, count = 0;
    int64_t *index = (int64_t *)memory, *order = index + most;
    uint32_t *rank = (uint32_t *)(order + k), *rest = rank + n;
    float *length = (float *)rest;
    uint32_t *search = rest + most;
    uint8_t *votes = (uint8_t *)(search + memory_words(most));
    memset(votes, 0, n);
    if (!vote_for_best(semantic, valid, n, k, rank, votes)) return -1;
    if (!vote_for_best(action, valid, n, k, rank, votes)) return -1;
    for (long i = 0; i < n; i++)
        if (votes[i]) {
            if (!bf16) length[count] = no_shorter(own[i]);
            index[count++] = i;
        }
    if (!max_min_search(features, index, length, n, count, width, stride, bf16, k, nearest, threads,
                        search, order))
        return 0;
    for (long i = 0; i < count; i++)
        if (!isfinite(length[i])) return -2;
    memset(votes, 0, n);
    for (long i = 0; i < k; i++) votes[index[order[i]]] = 1;
    for (long i = 0, found = 0; i < n; i++)
        if (votes[i]) picks[found++] = i;
    return 1;
}
