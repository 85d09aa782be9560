"""Keys and values of the last step stand in for tokens that leave, exactly as in a slow decoder."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from slow_cache import SlowStep, slow_choice, slow_pass, slow_similarity
from torch import Tensor
from transformers import DynamicCache, StaticCache

import vla_pruner as vp
from checks import near

M, LENGTH, DEPTH, SIZE = 20, 30, 6, 3  # 20 visual tokens behind BOS, patches of 3 x 3 pixels
VISUAL, CUTS = range(1, 21), (1, 3, 4)
TOKENS = [5, 6, 7]


def prune(model, **options):
    mode, views = options.pop("mode", "drop"), options.pop("views", (20,))
    adapter = vp.models.Decoder("model.layers", visual=slice(1, 21), views=views)
    options = {"keep": 0.4, "layers": CUTS, **options}
    return vp.prune(model, "vla-cache", adapter=adapter, mode=mode, **options)


def scene(episode: int, step: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Frame [1, 3, 12, 15] of 4 x 5 patches, of which a few change in each step; embeddings."""
    generator = torch.Generator().manual_seed(episode)
    frame = torch.randint(0, 256, (1, 3, 12, 15), generator=generator).float()
    embeds = torch.randn(length, 32, generator=generator)
    generator.manual_seed(1000 * episode + step)
    for token in torch.randperm(M, generator=generator)[:5].tolist():
        y, x = SIZE * (token // 5), SIZE * (token % 5)
        frame[..., y : y + SIZE, x : x + SIZE] *= torch.rand(SIZE, SIZE, generator=generator)
    return frame, embeds + 0.3 * torch.randn(length, 32, generator=generator)


class SlowEpisode:
    """An episode of the slow decoder."""

    def __init__(self, model, *, causal: bool = True, **options) -> None:
        self.model, self.causal = model, causal
        self.options = {"views": (M,), "cuts": CUTS, "keep": 0.4, **options}
        self.past: SlowStep | None = None
        self.reused: list[set[int]] = []

    def step(self, frame: Tensor, embeds: Tensor, tokens=TOKENS) -> Tensor:
        """Final hidden states of the prompt and of the decoded tokens."""
        self.reused = [set() for _ in range(DEPTH)]
        if self.past is not None:
            similarity = slow_similarity(self.past.frame, frame, SIZE)
            self.reused = slow_choice(self.past, similarity, **self.options)
        later = self.model.get_input_embeddings()(torch.tensor(tokens, dtype=torch.int64))
        self.past = slow_pass(
            self.model.model,
            torch.cat([embeds, later]),
            prompt=len(embeds),
            visual=VISUAL,
            text=range(21, len(embeds)),
            text_layer=DEPTH // 2 - 1,
            causal=self.causal,
            reused=self.reused,
            past=self.past,
        )
        self.past.frame = frame
        return self.past.output

    def counts(self) -> list[int]:
        return [len(tokens) for tokens in self.reused]


def check(model, logits: list[Tensor], output: Tensor, slow: SlowEpisode, row: int = 0) -> None:
    """Rows that were computed to the end, and decoded tokens, agree with the slow decoder."""
    gone, length = {VISUAL[token] for token in slow.reused[-1]}, logits[0].shape[1]
    rows = [at for at in range(length) if at not in gone]
    expected = model.lm_head(output)
    near(logits[0][row, rows], expected[rows])
    for number, later in enumerate(logits[1:]):
        near(later[row, 0], expected[length + number])


@pytest.mark.parametrize(
    ("family", "attention", "mode"),
    list(product(("llama", "qwen3"), ("sdpa", "eager"), ("drop", "mask"))),
)
def test_an_episode_equals_the_slow_decoder(decoders, rollout, family, attention, mode):
    model = decoders(family, attention)
    slow = SlowEpisode(model)
    with prune(model, mode=mode) as session:
        for number in range(4):
            frame, embeds = scene(0, number)
            session.frame(frame[None])
            logits = rollout(model, embeds[None])
            check(model, logits, slow.step(frame, embeds), slow)
            report = session.last
            assert report.reused.tolist() == [slow.counts()]
            assert report.warm_up.tolist() == [number == 0]
            left = [LENGTH - count if mode == "drop" else LENGTH for count in slow.counts()]
            assert report.tokens_per_layer == tuple(left)
            assert report.keys_per_layer == (LENGTH,) * DEPTH
            kept = set(report.kept_indices[0].tolist())
            assert kept == set(range(M)) - slow.reused[-1]
    counts = slow.counts()
    assert 0 == counts[0] < counts[1] <= counts[-1] <= 12


@pytest.mark.parametrize(
    "options",
    [
        {"limits": "code"},
        {"order": "similarity"},
        {"keep": 0.125},
        {"keep": 0.75, "order": "similarity", "growth": 0.0},
        {"threshold": 0.9},
        {"views": (10, 10)},
        {"views": (10, 10), "limits": "code", "threshold": -1.0},
    ],
)
def test_options_equal_the_slow_choice(decoders, rollout, options):
    model = decoders()
    slow = SlowEpisode(model, **options)
    with prune(model, **options) as session:
        for number in range(3):
            frame, embeds = scene(1, number)
            session.frame(frame[None])
            logits = rollout(model, embeds[None])
            check(model, logits, slow.step(frame, embeds), slow)
            assert session.last.reused.tolist() == [slow.counts()]
    assert slow.counts()[-1] > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["drop", "mask"])
def test_a_bidirectional_decoder_without_a_cache(decoders, attention, mode):
    model = decoders("llama", attention)
    slow = SlowEpisode(model, causal=False)
    everybody = torch.zeros(1, 1, LENGTH, LENGTH)
    with prune(model, mode=mode) as session:
        for number in range(3):
            frame, embeds = scene(2, number)
            session.frame(frame[None])
            output = model(inputs_embeds=embeds[None], attention_mask=everybody, use_cache=False)
            check(model, [output.logits], slow.step(frame, embeds, []), slow)
            assert session.last.reused.tolist() == [slow.counts()]
    assert slow.counts()[-1] > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_caches_hold_every_token_in_every_layer(decoders, rollout, attention, kind):
    model = decoders("llama", attention)
    slow = SlowEpisode(model)
    with prune(model) as session:
        for number in range(3):
            frame, embeds = scene(3, number)
            cache = DynamicCache()
            if kind == "static":
                cache = StaticCache(config=model.config, max_cache_len=40)
            session.frame(frame[None])
            logits = rollout(model, embeds[None], cache=cache)
            check(model, logits, slow.step(frame, embeds), slow)
            lengths = {int(cache.get_seq_length(layer)) for layer in range(DEPTH)}
            assert lengths == {LENGTH + len(TOKENS)}
    assert slow.counts()[-1] > 0


@pytest.mark.parametrize("mode", ["drop", "mask"])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_a_batch_are_episodes_of_their_own(decoders, rollout, mode, padded):
    """The second prompt is shorter where there is padding, and a third episode joins later."""
    model, longest = decoders(), LENGTH + 3 * padded
    lengths = {"a": longest, "b": LENGTH, "c": longest}
    slow = {name: SlowEpisode(model) for name in lengths}
    different = False
    with prune(model, mode=mode) as session:
        for number in range(4):
            names = "ab" if number < 2 else "cab"
            scenes = [scene(ord(name), number, lengths[name]) for name in names]
            embeds, mask = torch.zeros(len(names), longest, 32), torch.zeros(len(names), longest)
            for row, (_, x) in enumerate(scenes):
                embeds[row, longest - len(x) :] = x
                mask[row, longest - len(x) :] = 1
            session.episodes(list(names))
            session.frame(torch.stack([frame for frame, _ in scenes]))
            logits = rollout(model, embeds, mask=mask.long() if padded else None)
            for row, name in enumerate(names):
                output, length = slow[name].step(*scenes[row]), lengths[name]
                check(model, [logits[0][:, -length:], *logits[1:]], output, slow[name], row)
                assert session.last.reused[row].tolist() == slow[name].counts()
            different |= slow["a"].counts() != slow["b"].counts()
    assert different and all(episode.counts()[-1] > 0 for episode in slow.values())


def run(model, session, episode: int, number: int, length: int = LENGTH) -> list[int]:
    """A step of an episode; tokens that it reused in each layer."""
    frame, embeds = scene(episode, number, length)
    session.frame(frame[None])
    model(inputs_embeds=embeds[None])
    (reused,) = session.last.reused.tolist()
    return reused


def test_the_same_frame_again_reuses_what_the_formula_says(decoders, rollout):
    """Everything is static: in a causal decoder old keys are the new ones, and nothing changes."""
    model, slow = decoders(), SlowEpisode(decoders())
    frame, embeds = scene(4, 0)
    untouched = rollout(model, embeds[None])
    with prune(model, keep=0.4) as session:
        for _ in range(2):
            past = slow.past
            session.frame(frame[None])
            logits = rollout(model, embeds[None])
            slow.step(frame, embeds)
    e, shares = past.entropy, []
    for entropy in e:
        share = 1 - (entropy - min(e)) / (max(e) - min(e))
        rises = shares and share > shares[-1]
        shares.append(shares[-1] + 0.55 * (share - shares[-1]) if rises else share)
    assert session.last.reused.tolist() == [slow.counts()]
    # k = 12 of 20: the 18 most similar are static, all alike, so the first; 6 matter to the task.
    named = len(set(range(18)) - set(sorted(range(M), key=lambda t: -past.relevance[t])[:6]))
    n = min(named, 12)
    expected, most = [], 0
    for layer in range(DEPTH):
        most = max(most, 1, int(shares[layer] * n)) if layer in CUTS else most
        expected.append(most)
    assert slow.counts() == expected
    for one, other in zip(logits[1:], untouched[1:], strict=True):
        near(one, other)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_undone_to_the_bit(decoders, rollout, attention):
    model = decoders("llama", attention)
    _, embeds = scene(5, 0)
    untouched = rollout(model, embeds[None])
    session = prune(model)
    first = run(model, session, 5, 0)
    assert first == [0] * DEPTH
    assert run(model, session, 5, 1)[-1] > 0
    session.remove()
    for one, other in zip(rollout(model, embeds[None]), untouched, strict=True):
        assert torch.equal(one, other)
    with prune(model, keep=1.0) as session:
        for _ in range(2):
            session.frame(scene(5, 0)[0][None])
            for one, other in zip(rollout(model, embeds[None]), untouched, strict=True):
                assert torch.equal(one, other)


def test_reset_forgets(decoders):
    model = decoders()
    with prune(model) as session:
        session.episodes(["a"])
        before = [run(model, session, 6, number) for number in range(2)]
        session.reset(["b"])
        assert run(model, session, 6, 2)[-1] > 0
        session.reset(["a"])
        assert [run(model, session, 6, number) for number in range(2)] == before
        session.reset()
        assert [run(model, session, 6, number) for number in range(2)] == before
        assert before[0][-1] == 0 < before[1][-1]


def test_interleaved_episodes_are_what_each_is_alone(decoders):
    model, alone = decoders(), {}
    with prune(model) as session:
        for name in (7, 8):
            session.episodes([name])
            alone[name] = [run(model, session, name, number) for number in range(3)]
    with prune(model) as session:
        for number in range(3):
            for name in (7, 8):
                session.episodes([name])
                assert run(model, session, name, number) == alone[name][number]
    assert alone[7] != alone[8]


def test_a_prompt_of_another_length_is_computed_in_full(decoders):
    model = decoders()
    with prune(model) as session:
        assert run(model, session, 9, 0)[-1] == 0
        assert run(model, session, 9, 1, LENGTH + 1)[-1] == 0
        assert session.last.warm_up.tolist() == [True]
        assert run(model, session, 9, 2, LENGTH + 1)[-1] > 0


def test_visual_tokens_at_other_positions_are_computed_in_full(decoders):
    model = decoders()
    with prune(model) as session:
        for number, shift in enumerate([0, 0, 5, 5]):
            frame, embeds = scene(10, number)
            session.frame(frame[None])
            model(inputs_embeds=embeds[None], position_ids=torch.arange(LENGTH)[None] + shift)
            assert (session.last.reused[0, -1] > 0) == (number in (1, 3))


def test_prefills_of_one_step_reuse_the_same(decoders):
    """The first decides and is remembered; all of them recall the step before."""
    model = decoders()
    with prune(model) as session:
        alone = [run(model, session, 11, number) for number in range(3)]
        session.reset()
        for number in range(3):
            frame, embeds = scene(11, number)
            session.frame(frame[None])
            with session.step():
                found = []
                for _ in range(2):
                    found.append(model(inputs_embeds=embeds[None]).logits)
                    assert session.last.reused.tolist() == [alone[number]]
            assert torch.equal(*found)


def test_an_interrupted_step_is_not_remembered(decoders):
    model = decoders()
    with prune(model) as session:
        expected = [run(model, session, 12, number) for number in (0, 2)]
        session.reset()
        assert run(model, session, 12, 0) == expected[0]

        def stop(*args):
            raise KeyboardInterrupt

        handle = model.model.layers[4].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, session, 12, 1)
        handle.remove()
        assert run(model, session, 12, 2) == expected[1]


def test_frames_that_are_missing_or_do_not_fit(decoders):
    model = decoders()
    frame, embeds = scene(13, 0)
    with prune(model) as session:
        with pytest.raises(ValueError, match=r"call `session\.frame\(images\)` before each call"):
            model(inputs_embeds=embeds[None])
        run(model, session, 13, 0)
        with pytest.raises(ValueError, match="none came with this call"):
            model(inputs_embeds=embeds[None])  # The last call's frame is not this one's.
        session.frame(frame[None, ..., :-1])
        with pytest.raises(ValueError, match="12 x 14 pixels cannot be cut into 20 square patches"):
            model(inputs_embeds=embeds[None])
        session.frame(frame[None].expand(3, -1, -1, -1, -1))
        with pytest.raises(ValueError, match="frames of 3 rows for a batch of 2"):
            model(inputs_embeds=embeds.expand(2, -1, -1))
        for wrong in (frame[0], frame[None, :, :2]):
            with pytest.raises(ValueError, match=r"must be \[B, cameras, 3, H, W\]"):
                session.frame(wrong)


def test_what_cannot_be_done_is_refused(decoders, make):
    model = decoders()

    class Blind(vp.models.Decoder):
        gives_frames = False

    with pytest.raises(ValueError, match=r"vp\.models\.Decoder\(.*session\.frame\(images\)"):
        vp.prune(model, "vla-cache", adapter=Blind("model.layers", visual=slice(1, 21)))
    with prune(model) as session, pytest.raises(NotImplementedError, match="without `compile`"):
        session.compile()
    flexible = make("llama", "flex_attention")
    with pytest.raises(NotImplementedError, match='"sdpa" or "eager", not'):
        prune(flexible)
    with pytest.raises(ValueError, match="the decoder has 6 layers; use at most 5"):
        prune(model, layers=(2, 6))
    with pytest.raises(ValueError, match="`text_layer=6` does not exist"):
        prune(model, text_layer=6)
