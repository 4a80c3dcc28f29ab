"""Speculative decoding: a drafter guesses a block, the model checks it in one pass, and the output stays the model's.

At every position of a block the model's own token is taken (its likeliest, or one drawn from its distribution), and
guesses count while they equal it. So the text has exactly the distribution of one-at-a-time decoding, whatever the
drafter guesses; a bad drafter costs time only. Where a text ends, the cache holds what one-at-a-time decoding leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from flashdrive_node.engine.draft_rule import DraftRule, Script
from flashdrive_node.engine.drafted_texts import DraftedTexts, Speculated
from flashdrive_node.engine.graphs import Cuts, Graphs
from flashdrive_node.engine.kernels.attention import attend_for
from flashdrive_node.engine.kernels.sampling import draw
from flashdrive_node.engine.kernels.visibility import block_visibility
from flashdrive_node.engine.read_back import ReadBack
from flashdrive_node.engine.slot_pass import next_logits, run_at_slots
from flashdrive_node.engine.taps import Taps
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.inference import Context, Generated, StopRule
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.rope import mrope_cos_sin
from flashdrive_node.model.sampling import SamplingSettings

#: Repeated texts are padded to multiples of so many tokens.
REPEATED = 16


def slots_needed(rows: int, settings: SamplingSettings, block_size: int) -> int:
    """Cache slots that a decoder may touch behind the prefix."""
    return rows * (settings.max_length + block_size)


class TextDecoder:
    """Generates texts from one prefix, a block of each per pass; without a drafter a block is one token.

    Each text has a stretch of the cache for itself, behind the prefix. Shapes are the same from pass to pass, and a
    text that has ended is carried along, so a pass is one graph; the host learns its tokens with one read-back and
    decides whether another follows. On a GPU the drafter guesses the next block meanwhile, unless all texts have their
    end among the guesses that are being checked, which come true nearly always.
    In the end the slots of a text are those that `inference.decode` fills: up to and including the stop token, without
    the last token where the length limit or the end of turn cut the text.
    """

    def __init__(
        self,
        model: Alpamayo,
        cache: KVCache,
        rows: int,
        settings: SamplingSettings,
        rule: StopRule,
        draft: DraftRule | None = None,
        graphs: Graphs | None = None,
        script: Script | None = None,
        stretch: int | None = None,
        guess_ahead: bool | None = None,
    ):
        """Prepare for texts in a cache.

        Args:
            model: The target.
            cache: Holds the prompts; has `slots_needed` behind the longest.
            rows: Texts to generate at once.
            settings: How tokens are drawn.
            rule: When a text ends.
            draft: The drafter, if there is one.
            graphs: Of this decoder's cache; by default nothing is captured.
            script: For benchmarks.
            stretch: Slots per text; by default as many as `decode` may touch.
            guess_ahead: Whether blocks are guessed before the host knows that they are wanted; by default on GPUs,
                which would wait for the host otherwise.
        """
        self.model, self.cache, self.rows = model, cache, rows
        self.guess_ahead = model.device.type == "cuda" if guess_ahead is None else guess_ahead
        self.settings, self.rule, self.draft, self.script = settings, rule, draft, script
        self.graphs = graphs or Graphs(model.device, enabled=False)
        self.size = 1 if draft is None else draft.block_size
        self.stretch = stretch or settings.max_length + self.size
        device, vocabulary = model.device, model.config.tokens.vocab_size

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        #: Slots of the prefix, and position of the first generated token: int64 [1].
        self.prefix, self._position = numbers(1), numbers(1)
        # Of each text: the last token, which is not in the cache yet, and the number of tokens that are.
        self._known, self._used = numbers(rows), numbers(rows)
        # What a round gives the host: the known token, the model's own ones, and how many guesses were right.
        self._drawn = numbers(rows, self.size + 2)
        self._read_back = ReadBack(self._drawn)
        # The known token and the guesses behind it, and how many of these the drafter is sure of.
        self._block, self._sure = numbers(rows, self.size), numbers(rows)
        self._block_back, self._sure_back = ReadBack(self._block), ReadBack(self._sure)
        # Of the last pass: a token per text and its place in the text.
        self._tail = numbers(2, rows)
        self._repeated = numbers(rows, self.stretch)
        self._states: Tensor | None = None
        if draft is not None:
            width = len(draft.layer_ids) * model.config.text.hidden_size
            self._states = torch.zeros(rows, draft.context_length, width, device=device, dtype=model.dtype)
        # Filled by a generator before every pass, so that what is drawn does not depend on graphs.
        self._noise: Tensor | None = None
        if not settings.greedy:
            self._noise = torch.ones(rows * self.size, vocabulary, device=device)
        self._row = torch.arange(rows, device=device)
        self._step = torch.arange(self.size, device=device)
        self._window = torch.arange(0 if draft is None else draft.context_length, device=device)

    def decode(
        self, context: Context, logits: Tensor, states: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Speculated:
        """Generate texts.

        Args:
            context: The prompt, in this decoder's cache.
            logits: Of the first token, [1, vocabulary]. Later calls give the same tensor where graphs run.
            states: Of `Taps` for the last `context_length` tokens of the prompt; the same holds.
            generator: Source of randomness on the model's device.
        """
        self.cache.require(context.prefix + self.rows * self.stretch)
        self.prefix.fill_(context.prefix)
        self._position.fill_(context.prefix + context.rope_delta)
        self._draw_noise(self.rows, generator)
        self.graphs.run((self, "first token"), lambda: self._first(logits, states))
        texts, guessed = DraftedTexts(self.rows, self.settings.max_length, self.rule), False
        if self.guess_ahead:
            self._start_guess()
            guessed = True
        while texts.running:
            if not guessed:
                self._start_guess()
            size = self._start_check(texts.running, generator)
            guessed = self.guess_ahead and not self._may_end(texts.running, size)
            if guessed:
                self._start_guess()
            texts.add(self._read_back.wait().tolist(), size)
        said, missing = texts.finished()
        if missing is not None:
            self._tail.copy_(torch.tensor(missing), non_blocking=True)
            self.graphs.run((self, "tail"), self._run_tail)
        return said

    def _start_guess(self) -> None:
        """Fill the blocks behind the known tokens."""
        if self.draft is None:
            return
        self.graphs.run((self, "guess"), self._guess)
        if self.guess_ahead:
            self._block_back.start(self._block)
        if self.draft.skip is not None:
            self._sure_back.start(self._sure)

    def _may_end(self, running: list[int], size: int) -> bool:
        """Whether all texts that go on end with the guesses of theirs that are being checked, if these are right."""
        if self.draft is None or self.rule.stop is None:
            return False
        # Guesses are older than the check that the device is at, so this waits for little.
        guesses = self._block_back.wait()[running, 1:size]
        return bool((guesses == self.rule.stop).any(dim=1).all())

    def _start_check(self, running: list[int], generator: torch.Generator | None) -> int:
        """Check the blocks, the result of which is on its way to the host then; the size of a block."""
        skip = None if self.draft is None else self.draft.skip
        size = self.size
        if skip is not None:
            surest = max(self._sure_back.wait()[running].tolist())
            size = next(size for size in skip.sizes if size > surest or size == self.size)
        self._draw_noise(self.rows * size, generator)
        self._run_check(size)
        self._read_back.start(self._drawn)
        return size

    def _run_check(self, size: int) -> None:
        self.graphs.run((self, "check", size), lambda: self._check(size))

    def stretches(self, context: Context) -> tuple[tuple[int, ...], int]:
        """First slot of each text behind a prompt, and the first slot behind all texts."""
        return (
            tuple(context.prefix + row * self.stretch for row in range(self.rows)),
            context.prefix + self.rows * self.stretch,
        )

    def repeat(self, context: Context, text: Generated) -> None:
        """Put texts that another context generated behind this one, in one pass.

        Args:
            context: The prompt, in this decoder's cache.
            text: Of as many rows as this decoder's; tokens on the host.
        """
        # Lengths in steps of a block, so that few are captured; what stands behind a text's end is not looked at.
        steps = min(-(-text.tokens.shape[1] // REPEATED) * REPEATED, self.stretch)
        tokens = torch.full((self.rows, steps), self.rule.pad)
        tokens[:, : text.tokens.shape[1]] = text.tokens
        self.prefix.fill_(context.prefix)
        self._position.fill_(context.prefix + context.rope_delta)
        self._repeated[:, :steps].copy_(tokens, non_blocking=True)
        self.graphs.run((self, "repeat", steps), lambda: self._run_repeated(steps))

    def _run_repeated(self, steps: int) -> None:
        self._run(self._repeated[:, :steps], torch.zeros_like(self._used), ())

    def _draw_noise(self, draws: int, generator: torch.Generator | None) -> None:
        if self._noise is not None:
            self._noise[:draws].exponential_(generator=generator)

    def _choose(self, logits: Tensor) -> Tensor:
        """The model's own tokens: logits [n, vocabulary], which are changed, to int64 [n]."""
        noise = None if self._noise is None else self._noise[: len(logits)]
        return draw(forbid(logits, self.rule), self.settings, noise)

    def _first(self, logits: Tensor, states: Tensor | None) -> None:
        """Take the first tokens, and forget what was generated before."""
        self._known.copy_(self._choose(logits.expand(self.rows, -1).clone()))
        self._used.zero_()
        if self.script is not None:
            self._known.copy_(self.script.tokens[:, 0])
        if self._states is not None:
            assert states is not None
            self._states.copy_(states)
        if self.draft is not None and self.draft.begin is not None:
            self.draft.begin()

    def _guess(self) -> None:
        """Fill the blocks: the known tokens and what may follow."""
        known, rule, draft = self._known, self.rule, self.draft
        assert draft is not None
        assert self._states is not None
        chances: Tensor | None = None
        if draft.skip is None:
            guesses = draft.propose(known, self._states, self._used)
        else:
            guesses, chances = draft.skip.propose(known, self._states, self._used)
        block = self._scripted_guesses(torch.cat((known[:, None], guesses), dim=1))
        if draft.closing is not None and rule.stop is not None:
            closed = block[:, :-1] == draft.closing
            block[:, 1:] = torch.where(closed, rule.stop, block[:, 1:])
            chances = None if chances is None else chances.masked_fill(closed, 1.0)
        self._block.copy_(block)
        if draft.skip is not None and chances is not None:
            self._sure.copy_((chances.cumprod(dim=1) >= draft.skip.confidence).sum(dim=1))

    def _check(self, size: int) -> None:
        """Let the model check the first `size` tokens of the blocks."""
        draft = self.draft
        block = self._known[:, None].clone() if draft is None else self._block[:, :size]
        hidden, new = self._run(block, self._used, () if draft is None else draft.layer_ids)
        # The model's own token behind each token of a block, given that the block is right so far.
        own = self._choose(next_logits(self.model.language, hidden)).view(self.rows, size)
        own = self._scripted(own, 1)
        accepted = (own[:, :-1] == block[:, 1:]).cumprod(dim=1).sum(dim=1)
        if self._states is not None:
            last = (self._window + accepted[:, None] + 1)[..., None].expand(-1, -1, new.shape[-1])
            self._states.copy_(torch.cat((self._states, new), dim=1).gather(1, last))
        self._known.copy_(own.gather(1, accepted[:, None])[:, 0])
        # Guesses behind are overwritten by the next block. A text that has ended stays within its stretch.
        self._used.copy_((self._used + accepted + 1).clamp(max=self.settings.max_length - 1))
        self._drawn[:, : size + 2] = torch.cat((block[:, :1], own, accepted[:, None]), dim=1)

    def _scripted(self, tokens: Tensor, ahead: int) -> Tensor:
        """What the script has in the place of a block of tokens that starts so many places ahead of the cache's end."""
        if self.script is None:
            return tokens
        index = self._used[:, None] + ahead + torch.arange(tokens.shape[1], device=tokens.device)
        return self.script.tokens.gather(1, index.clamp(max=self.script.tokens.shape[1] - 1))

    def _scripted_guesses(self, block: Tensor) -> Tensor:
        """The script's tokens for as many guesses as are meant to be right, and then one that is wrong."""
        if self.script is None:
            return block
        right = self._step < self.script.gain
        return torch.where(right, self._scripted(block, 0), self.rule.pad)

    def _run(self, block: Tensor, used: Tensor, layer_ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Run a block of tokens of each text, causal within the text.

        Args:
            block: int64 [rows, block].
            used: Tokens of each text in front of its block, int64 [rows].
            layer_ids: Layers to tap.

        Returns:
            Hidden states behind the final norm [rows * block, hidden], and tapped states [rows, block, context_size].
        """
        language, (rows, size) = self.model.language, block.shape
        index = used[:, None] + torch.arange(size, device=block.device)  # of each token in its text, [rows, block]
        slots = (self.prefix + self._row[:, None] * self.stretch + index).flatten()
        visible = block_visibility(self.prefix, used, self.stretch, size)
        positions = (index.flatten() + self._position).expand(3, -1)
        taps, cuts = Taps(layer_ids), Cuts(self.graphs, len(language.layers))

        def behind(layer: int, value: Tensor) -> None:
            taps.see(layer, value)
            cuts.behind(layer, value)

        x = embedding(block.flatten(), language.embed_tokens.weight)
        hidden = run_at_slots(
            language.layers,
            language.norm,
            x,
            mrope_cos_sin(positions, language.config, x.dtype),
            slots,
            self.cache,
            lambda q, keys, values, reader: attend_for(reader, q, keys, values, visible),
            tap=behind,
        )
        states = taps.states() if layer_ids else hidden[:, :0]
        return hidden, states.unflatten(0, (rows, size))

    def rehearse(self) -> None:
        """Run what few texts need, so that it is captured: call twice behind a text."""
        self._tail.zero_()
        self.graphs.run((self, "tail"), self._run_tail)
        if self.draft is not None and self.draft.skip is not None:
            for size in self.draft.skip.sizes:
                self._run_check(size)

    def _run_tail(self) -> None:
        """Put one more token of each text into the cache."""
        self._run(self._tail[0][:, None], self._tail[1], ())


def forbidden_bias(model: Alpamayo, rule: StopRule) -> Tensor | None:
    """What keeps forbidden tokens from being guessed: added to logits, [vocabulary]."""
    if rule.forbidden is None:
        return None
    first, count = rule.forbidden
    bias = torch.zeros(model.config.tokens.vocab_size, device=model.device)
    bias[first : first + count] = -torch.inf
    return bias


def forbid(logits: Tensor, rule: StopRule) -> Tensor:
    """Keep forbidden tokens from being drawn: logits [n, vocabulary] are changed in place."""
    if rule.forbidden is not None:
        first, count = rule.forbidden
        logits[:, first : first + count] = -torch.inf
    return logits
