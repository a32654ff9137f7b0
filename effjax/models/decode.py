"""Generation with a decoding state: prefill once, then one token a step, under one `jit`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo

Tree = Any

_BUCKET = 64  # prompts are padded to a multiple of this, so that few lengths compile


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token (greedy).
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the smallest set of tokens with at least this probability (nucleus sampling,
        arXiv 1904.09751); 1 keeps all.

    Raises:
      ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ConfigError(f'temperature must not be negative, got {self.temperature}.')
        if self.top_k < 0:
            raise ConfigError(f'top_k must be 0 (all tokens) or positive, got {self.top_k}.')
        if not 0 < self.top_p <= 1:
            raise ConfigError(f'top_p must be above 0 and at most 1, got {self.top_p}.')


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token a row: int32 [B] from logits [B, V]."""
    chex.assert_rank(logits_BV, 2)
    logits = logits_BV.astype(jnp.float32)
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = filtered(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return jax.random.categorical(key, logits, -1).astype(jnp.int32)


def filtered(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Returns logits with the tokens outside top-k and top-p at minus infinity."""
    if top_k and top_k < logits_BV.shape[-1]:
        least = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    if top_p < 1:
        ordered = jnp.sort(logits_BV, -1, descending=True)
        p = jax.nn.softmax(ordered, -1)
        before = jnp.cumsum(p, -1) - p  # probability of everything more likely
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return logits_BV


def prefill(
    model: Any, tokens_BT: jax.Array, lengths_B: jax.Array, max_len: int, dtype: Any
) -> tuple[jax.Array, Tree]:
    """Reads prompts of different lengths, padded on the right.

    Args:
      model: a decoder.
      tokens_BT: int32 [B, T].
      lengths_B: int32 [B], at least 1; the tokens after a row's length are ignored.
      max_len: tokens that the state must hold, those to be generated included.
      dtype: dtype of the cache.

    Returns:
      Logits float32 [B, V] after each row's last token, and the decoding state there.
    """
    chex.assert_rank([tokens_BT, lengths_B], [2, 1])
    batch, length = tokens_BT.shape
    real = jnp.arange(length) < lengths_B[:, None]
    info = SeqInfo.of(batch, length, segment_ids=real.astype(jnp.int32))
    state = model.init_state(batch, max_len, dtype)
    hidden, state = model.prefill(tokens_BT, state, info)
    last_BD = jnp.take_along_axis(hidden, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last_BD), state


def make_generate(
    graphdef: nnx.GraphDef,
    *,
    tokens: int,
    sampling: Sampling = Sampling(),
    stop: int | None = None,
    dtype: Any = None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns a compiled `generate(params, buffers, prompt_BT, lengths_B, key)`.

    Args:
      graphdef: the decoder without its arrays.
      tokens: how many tokens to generate at most; a constant of the program.
      sampling: how they are drawn.
      stop: a row ends with this token; the loop ends when all rows have. None never ends early.
      dtype: dtype of the cache; None is the model's compute dtype.

    Returns:
      The function; it gives int32 [B, tokens] (`stop` or 0 after a row's end) and int32 [B]
      counts of tokens generated, the stop token included.
    """

    def generate(params: Tree, buffers: Tree, prompt_BT, lengths_B, key):
        model = nnx.merge(graphdef, params, buffers)
        batch, length = prompt_BT.shape
        cache = dtype or model.compute_dtype
        logits, state = prefill(model, prompt_BT, lengths_B, length + tokens, cache)
        out = jnp.full((batch, tokens), 0 if stop is None else stop, jnp.int32)
        start = (
            jnp.int32(0),
            logits,
            model.by_layer(state),
            out,
            jnp.zeros(batch, jnp.int32),
            jnp.full(batch, True),
        )

        def unfinished(carry):
            return (carry[0] < tokens) & jnp.any(carry[-1])

        def body(carry):
            i, logits, state, out, counts, alive = carry
            token = sample(logits, jax.random.fold_in(key, i), sampling)
            out = out.at[:, i].set(jnp.where(alive, token, out[:, i]))
            counts = counts + alive
            if stop is not None:
                alive = alive & (token != stop)
            hidden, state = model.step(token, state)
            return i + 1, model.logits(hidden), state, out, counts, alive

        _, _, _, out, counts, _ = jax.lax.while_loop(unfinished, body, start)
        return out, counts

    return jax.jit(generate)


def complete(
    graphdef: nnx.GraphDef,
    arrays: Mapping[str, Tree],
    tokenizer: Any,
    prompt: str,
    *,
    max_len: int,
    tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> str:
    """Continues a text with a trained decoder.

    The text ends with the document, which is where the separator comes, or after `tokens` tokens.
    Where prompt and continuation do not fit into `max_len` together, the continuation is made in
    pieces of half that length, each given as much of the text before it as fits.

    Args:
      graphdef: the decoder without its arrays.
      arrays: dict(params=, buffers=).
      tokenizer: has `encode`, `decode` and `bos_id` (an id, or None).
      prompt: text to go on from; empty begins a document.
      max_len: the longest sequence that the decoder takes.
      tokens: most tokens to generate, at least 1.
      sampling: how they are drawn.
      seed: of the draws.

    Returns:
      The continuation, without the prompt.

    Raises:
      ConfigError: no tokens asked for, or a model too short for a prompt and a continuation.
    """
    if tokens < 1 or max_len < 2:
        raise ConfigError(
            f'cannot generate {tokens} tokens with a model of {max_len} positions; ask for at '
            'least 1 token of a model with at least 2 positions.'
        )
    bos = tokenizer.bos_id
    start = ([] if bos is None else [bos]) + [int(i) for i in tokenizer.encode(prompt)]
    start = start or [0]  # a tokenizer without separator, and no prompt
    piece, width = tokens, -(-len(start) // _BUCKET) * _BUCKET
    if width + piece > max_len:
        piece = min(tokens, max_len // 2)
        width = max_len - piece
    generate = make_generate(graphdef, tokens=piece, sampling=sampling, stop=bos)
    new: list[int] = []
    key = jax.random.key(seed)
    while len(new) < tokens:
        given = (start + new)[-width:]
        row = np.zeros((1, width), np.int32)
        row[0, : len(given)] = given
        out, counts = generate(
            arrays['params'], arrays['buffers'], row, np.array([len(given)], np.int32),
            jax.random.fold_in(key, len(new)),
        )  # fmt: skip
        new += np.asarray(out)[0, : int(counts[0])].tolist()
        if new[-1] == bos:
            break
    return tokenizer.decode([i for i in new[:tokens] if i != bos])
