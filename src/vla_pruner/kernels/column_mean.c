/* Attention that keys receive, mean over heads and query rows (Eq. 2 and 4): native.py compiles it.
 *
 * One pass over blocks of query rows: products, softmax, and a running sum per key; nothing of the
 * size rows x keys exists. Rows of weight 0 and keys that no row of a block may see are not computed.
 * Each head, and each of SPLITS parts of its rows, has a sum of its own, and these are added up in
 * order: threads change nothing.
 */
#include "lanes.h"

#ifdef _OPENMP
int omp_get_thread_num(void);
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#define SPLITS 4                /* parts of a head's rows, for more threads than heads */
#define SMALL (1L << 18)        /* products that are not worth a second thread */
#define LOWEST (-1e30f)         /* what an additive mask may add at least, and still be seen */

typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

enum mask { NO_MASK, BOOLS, FLOATS, BFLOATS };

/* Strides count words of queries and keys, and entries of everything else. */
struct attention {
    const uint32_t *query, *key;
    const void *mask;
    const float *sinks, *weight;        /* or NULL; [batch][queries] */
    const int64_t *rows;                /* [batch][voting] */
    const int64_t *columns;             /* [batch][asked], keys that are asked about; -1 gets 0 */
    uint32_t *memory;
    float *received;                    /* [batch][asked] */
    long batch, heads, kv_heads, queries, keys, width, voting, asked;
    long query_stride[3], key_stride[3], mask_stride[3]; /* batch, head, row; masks lie key by key */
    float scale, softcap, hidden_below; /* softcap 0: none; additive masks hide what is not above */
    int bf16, mask_kind, causal, threads;
};

static inline floats spread(float x) { return (floats){0} + x; }

static inline floats choose(ints where, floats yes, floats no)
{
    return (floats)((where & (ints)yes) | (~where & (ints)no));
}

static inline floats larger(floats a, floats b)
{
#if defined(__AVX512F__)
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

/* exp(x) for x <= 0, to about one unit in the last place; 0 far below. */
static inline floats exponential(floats x)
{
    const float shift = 12582912.0f;    /* 1.5 * 2^23: adding it rounds to whole numbers */
#ifdef __AVX512F__
    x = larger(spread(-110.0f), x);
#endif
    floats t = x * 1.44269504f + shift, n = t - shift;
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#ifdef __AVX512F__
    return (floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    ints power = ((ints)t - (ints)spread(shift) + 127) << 23;
    return choose(x < -87.0f, (floats){0}, p * (floats)power);
#endif
}

static inline floats capped(floats x, float cap)
{
    floats size = choose(x < 0.0f, -x, x) * (-2.0f / cap);
    floats small = exponential(size), tanh = (1.0f - small) / (1.0f + small);
    return choose(x < 0.0f, -tanh, tanh) * cap;
}

static float sum_of(floats x)
{
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

static float most_of(floats x)
{
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

PRODUCT(product_fp32, FP32, put)
PRODUCT(product_bf16, BF16, put)

static long panels(long n) { return (n + COLUMNS - 1) / COLUMNS; }

static long row_of(const struct attention *a, long b, long i)
{
    return a->rows[b * a->voting + i];
}

static long keys_seen(const struct attention *a, long row)
{
    long seen = a->causal ? row + a->keys - a->queries + 1 : a->keys;
    return seen < 0 ? 0 : seen;
}

/* The first `count` entries of a vector. */
static inline void read(void *vector, const void *from, long count, size_t size)
{
    if (count == LANES)
        memcpy(vector, from, LANES * size);
    else
        memcpy(vector, from, count * size);
}

/* Which of the keys j, j + 1, ... a mask hides; what it adds to the others goes to `bias`. */
static inline ints masked(const struct attention *a, const void *mask, long j, long count,
                          floats *bias)
{
    *bias = (floats){0};
    if (a->mask_kind == BOOLS) {
        bytes found = {0};
        read(&found, (const uint8_t *)mask + j, count, 1);
        return __builtin_convertvector(found, ints) == 0;
    }
    if (a->mask_kind == FLOATS)
        read(bias, (const float *)mask + j, count, 4);
    else {
        halves found = {0};
        read(&found, (const uint16_t *)mask + j, count, 2);
        *bias = (floats)(__builtin_convertvector(found, words) << 16);
    }
    ints hidden = *bias <= a->hidden_below;
    *bias = larger(spread(LOWEST), *bias);      /* The second if one is NaN. */
    return hidden;
}

/* Whether a mask is one row of bools for all of a batch element, and hides nothing from anybody. */
static int hides_nothing(const struct attention *a, long b)
{
    if (a->mask_kind != BOOLS || a->mask_stride[1] || a->mask_stride[2]) return 0;
    return !memchr((const uint8_t *)a->mask + b * a->mask_stride[0], 0, a->keys);
}

/* Logits of one row to probabilities, but for the factor that is returned: its weight over their
 * sum, 0 if it sees nothing. From `seen` on they become 0, up to `most`. */
static float softmax(const struct attention *a, float *logit, const void *mask, long seen, long most,
                     const float *sink, float weight)
{
    const ints number = {0, 1, 2, 3,
#if LANES > 4
                         4, 5, 6, 7,
#endif
#if LANES > 8
                         8, 9, 10, 11, 12, 13, 14, 15
#endif
    };
    floats largest = spread(-INFINITY), broken = {0}, total = {0};
    long whole = mask || a->softcap != 0 || a->scale <= 0 ? 0 : seen / LANES * LANES;
    for (long j = 0; j < whole; j += LANES) {
        floats x;
        memcpy(&x, logit + j, sizeof x);
        broken += x * 0.0f;
        largest = larger(x, largest);
    }
    largest *= a->scale;
    for (long j = whole; j < seen; j += LANES) {
        long count = seen - j < LANES ? seen - j : LANES;
        floats x, bias;
        memcpy(&x, logit + j, sizeof x);
        x *= a->scale;
        if (a->softcap != 0) x = capped(x, a->softcap);
        ints hidden = {0};
        if (mask) {
            hidden = masked(a, mask, j, count, &bias);
            x += bias;
        }
        if (count < LANES) hidden |= number >= (int)count;
        broken += choose(hidden, (floats){0}, x) * 0.0f;
        x = choose(hidden, spread(-INFINITY), x);
        memcpy(logit + j, &x, sizeof x);
        largest = larger(x, largest);
    }
    float top = most_of(largest), hurt = sum_of(broken);    /* NaN if one is NaN or infinite */
    if (top == -INFINITY && hurt == 0) {
        memset(logit, 0, most * sizeof *logit);
        return 0;
    }
    if (sink && *sink > top) top = *sink;
    for (long j = 0; j < whole; j += LANES) {
        floats x;
        memcpy(&x, logit + j, sizeof x);
        x = exponential(x * a->scale - top);
        total += x;
        memcpy(logit + j, &x, sizeof x);
    }
    for (long j = whole; j < most; j += LANES) {
        floats x = {0};
        if (j < seen) {
            memcpy(&x, logit + j, sizeof x);
            x = exponential(x - top);
            total += x;
        }
        memcpy(logit + j, &x, sizeof x);
    }
    float all = sum_of(total) + hurt;
    if (sink) all += expf(*sink - top);
    return weight / all;
}

/* Rows `start` to `stop` of those that vote, one head: adds to `sum` what each key receives. */
static void add_head(const struct attention *a, long b, long head, long start, long stop,
                     const uint32_t *keys, uint32_t *query, float *logits, float *sum)
{
    long all = panels(a->keys) * COLUMNS;
    const float *weight = a->weight ? a->weight + b * a->queries : 0;
    const uint32_t *from = a->query + b * a->query_stride[0] + head * a->query_stride[1];
    size_t size = a->mask_kind == FLOATS ? 4 : a->mask_kind == BFLOATS ? 2 : 1;
    const char *mask = a->mask && !hides_nothing(a, b) ? a->mask : 0;
    if (mask) mask += size * (b * a->mask_stride[0] + head * a->mask_stride[1]);
    while (start < stop) {
        const uint32_t *lane[COLUMNS] = {0};
        long row[COLUMNS], count = 0, most = 0;
        for (; start < stop && count < COLUMNS; start++) {
            long at = row_of(a, b, start), seen = keys_seen(a, at);
            if (!seen || (weight && weight[at] == 0)) continue;
            if (seen > most) most = seen;
            row[count] = at;
            lane[count++] = from + at * a->query_stride[2];
        }
        if (!count) break;
        most = (most + LANES - 1) / LANES * LANES;
        for (int i = 0; i < COLUMNS; i += LANES) pack(lane + i, 0, a->width, query + i);
        for (long i = 0; i < count; i += ROWS) {
            long rows = count - i < ROWS ? count - i : ROWS;
            float factor[ROWS];
            for (long j = 0; j < most; j += COLUMNS)
                (a->bf16 ? product_bf16 : product_fp32)(query + i, keys + j * a->width, a->width,
                                                        logits + j, all);
            for (long r = 0; r < rows; r++)
                factor[r] = softmax(a, logits + r * all,
                                    mask ? mask + size * row[i + r] * a->mask_stride[2] : 0,
                                    keys_seen(a, row[i + r]), most, a->sinks ? a->sinks + head : 0,
                                    weight ? weight[row[i + r]] : 1.0f);
            for (long j = 0; j < most; j += LANES) {
                floats all_rows = {0};
                for (long r = 0; r < rows; r++) {
                    floats x;
                    memcpy(&x, logits + r * all + j, sizeof x);
                    all_rows += x * factor[r];
                }
                add(sum + j, all_rows);
            }
        }
    }
}

/* Words of memory for panels of keys and sums; each thread needs the second number as well. */
static long shared_words(const struct attention *a)
{
    long all = panels(a->keys) * COLUMNS;
    return a->kv_heads * all * a->width + a->heads * SPLITS * all;
}

static long own_words(const struct attention *a)
{
    return COLUMNS * (a->width + panels(a->keys) * ROWS);
}

long column_mean_words(const struct attention *a)
{
    return shared_words(a) + a->threads * own_words(a);
}

/* Returns 1; 0, with nothing read beyond them and nothing written, if a row or a column is out of
 * range. */
int column_mean(const struct attention *a)
{
    if (a->voting < 1 || a->keys < 1 || a->threads < 1) return 0;
    for (long b = 0; b < a->batch; b++) {
        for (long i = 0; i < a->voting; i++)
            if (row_of(a, b, i) < 0 || row_of(a, b, i) >= a->queries) return 0;
        for (long i = 0; i < a->asked; i++) {
            int64_t column = a->columns[b * a->asked + i];
            if (column < -1 || column >= a->keys) return 0;
        }
    }
    long all = panels(a->keys) * COLUMNS, group = a->heads / a->kv_heads;
    long splits = panels(a->voting) < SPLITS ? panels(a->voting) : SPLITS;
    long part = panels((a->voting + splits - 1) / splits) * COLUMNS;
    long strips = all / LANES;
    uint32_t *keys = a->memory;
    float *sums = (float *)(keys + a->kv_heads * all * a->width);
    long products = a->heads * a->voting * a->keys * a->width;

    for (long b = 0; b < a->batch; b++) {
        const uint32_t *from = a->key + b * a->key_stride[0];
#pragma omp parallel for schedule(static) num_threads(a->threads) if (products > SMALL)
        for (long strip = 0; strip < a->kv_heads * strips; strip++) {
            long head = strip / strips, start = strip % strips * LANES;
            const uint32_t *lane[LANES];
            for (long i = 0; i < LANES; i++)
                lane[i] = start + i < a->keys ? from + head * a->key_stride[1] +
                                                    (start + i) * a->key_stride[2] : 0;
            pack(lane, 0, a->width,
                 keys + head * all * a->width + start / COLUMNS * COLUMNS * a->width +
                     start % COLUMNS);
        }
#pragma omp parallel num_threads(a->threads) if (products > SMALL)
        {
            uint32_t *query = a->memory + shared_words(a) + omp_get_thread_num() * own_words(a);
            float *logits = (float *)(query + COLUMNS * a->width);
#pragma omp for schedule(dynamic)
            for (long task = 0; task < a->heads * splits; task++) {
                long head = task / splits, start = task % splits * part;
                long stop = start + part < a->voting ? start + part : a->voting;
                float *sum = sums + task * all;
                memset(sum, 0, all * sizeof *sum);
                add_head(a, b, head, start, stop, keys + head / group * all * a->width, query,
                         logits, sum);
            }
        }
        float share = 0;
        for (long i = 0; i < a->voting; i++)
            share += a->weight ? a->weight[b * a->queries + row_of(a, b, i)] : 1.0f;
        share *= a->heads;
        for (long task = 1; task < a->heads * splits; task++)
            for (long j = 0; j < all; j++) sums[j] += sums[task * all + j];
        for (long i = 0; i < a->asked; i++) {
            int64_t column = a->columns[b * a->asked + i];
            a->received[b * a->asked + i] = column < 0 ? 0 : sums[column] / (share > 0 ? share : 1);
        }
    }
    return 1;
}
