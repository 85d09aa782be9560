/* Greedy search for a large determinant (CDPruner): native.py compiles it, determinant.py says what it is. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Words of memory for a search of k among n tokens. */
long determinant_words(long n, long k) { return k * n + 2 * n; }

/* cosine [n, n], quality [n] in [0, 1], last [n] below 0: the order of tokens that add nothing;
 * nothing: what counts as none of a token's squared length. picks [k]: in the order picked. Returns
 * 1; 0, with nothing read or written, for a k out of range. */
int determinant_search(const float *cosine, const float *quality, const float *last, long n, long k,
                       float nothing, float *memory, int64_t *picks)
{
    if (k < 1 || k > n) return 0;
    float *factor = memory, *rest = factor + k * n, *score = rest + n;
    for (long j = 0; j < n; j++) rest[j] = 1.0f;
    for (long step = 0; step < k; step++) {
        for (long j = 0; j < n; j++) {
            float gain = quality[j] * quality[j] * rest[j];
            score[j] = rest[j] > nothing && gain > 0.0f ? gain : last[j];
        }
        for (long i = 0; i < step; i++) score[picks[i]] = -INFINITY;
        long pick = 0;
        for (long j = 1; j < n; j++)
            if (score[j] > score[pick]) pick = j;
        picks[step] = pick;
        float *row = factor + step * n, left = rest[pick];
        if (left <= nothing) {
            memset(row, 0, n * sizeof *row);
            continue;
        }
        memcpy(row, cosine + pick * n, n * sizeof *row);
        for (long i = 0; i < step; i++) {
            const float *earlier = factor + i * n;
            float own = earlier[pick];
            if (own != 0.0f)
                for (long j = 0; j < n; j++) row[j] -= own * earlier[j];
        }
        float scale = 1.0f / sqrtf(left);
        for (long j = 0; j < n; j++) {
            row[j] *= scale;
            rest[j] -= row[j] * row[j];
        }
    }
    return 1;
}
