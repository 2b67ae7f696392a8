"""transformers vision-language models: cuts in the tower, at the entry and inside the language model.

The contract for methods
------------------------

``Method.stages(info)`` names visits, ``Method.reduce(site)`` is called at each:

- ``Stage("image", 0)``: in front of the tower. The site has ``grid`` and ``n`` of one picture (an image, a
  crop or tile of one, a frame) in visual tokens, and no features; ``Reduction.grid`` gives the smaller
  one. The tower then gets smaller pictures, and the prompt has their tokens: the logits are the bare
  model's for these pictures. It cannot be combined with looks into the tower. Families whose crops are
  joined by the sizes of the configuration refuse it (``info.closed["image"]``).
- ``Stage("pixels", 0)``: in front of the tower, for the images of families whose towers take patches one by one
  (Qwen); videos are left as they are. The site has one picture: ``hidden`` (1, N, pixels) are the pixels of each
  visual token, and ``grid`` its rows and columns. ``Reduction.map`` is merged (:meth:`vtr.TokenMap.merged`): it
  says of every token that is left out which one represents it. The tower then computes the tokens that are left, each at
  its own place and, with windows, in its own window; the others are taken out of the prompt. It
  cannot be combined with ``image`` or with looks into the tower.
- ``Stage("encoder", l, "middle" or "end")``: inside the vision tower, as for any encoder. The batch is
  the **crops** of all images of the call. A method that only looks here (``Stage(..., cuts=False)``) stores
  what it needs in ``site.memory``. A cut here is carried out twice: the tower's later layers run with
  fewer tokens, and the dropped tokens are taken out of the prompt at the entry of the language model (in
  between features have full length, because transformers checks their number). Families whose
  connector joins patches, or whose tower needs its full grid, refuse cuts here, not looks. LLaVA-OneVision
  and LLaVA-NeXT-Video, which make the frames of a video smaller behind the tower, take cuts here for
  images alone; ``apply`` warns of it and :func:`vtr.supported` notes it. For a video
  the crops are the frames of all videos of the call. A prompt with images and videos runs the tower
  twice; the values that a method stored per crop in the two runs are joined for its later visits.
- ``Stage("prompt", 0)``: the entry of the language model, after the projector. The batch is the
  **samples**.
- ``Stage("decoder", k, "start")``: before layer k, with the q, k, v that layer k will compute;
  ``Stage("decoder", k, "end")``: after layer k, with the q, k, v that it has used. Both cuts leave
  layers < k (or <= k) with the full sequence and its whole KV cache. Nothing can be cut after the
  last layer. ``Stage("decoder", k, "middle")``: between attention and MLP of layer k, as at its end,
  and what is cut does not go through the MLP either; only if ``info.decoder_middle`` is True
  (LLaMA, Mistral and Qwen layers).

At ``prompt`` and ``decoder`` the site is a :class:`vtr.core.language_site.LanguageSite`: ``hidden`` (B, N, C),
``valid``, ``map`` (from the visual tokens of the prompt), ``index``, ``text``, ``text_valid``,
``text_after``, ``images``, ``spread(scores)`` and, in the decoder, ``queries``/``keys``/``values`` of
the visual tokens through ``qkv``, ``attention_rows_from_text(rows)`` and ``text_qkv(rows)``.
``site.memory`` is one dict per method for the whole prefill, shared by its encoder, prompt and decoder
visits. ``site.entry`` is (B,) int64, the visual tokens of each sample in the prompt.

The place and time of tokens: ``site.frame``, ``site.place`` and ``site.video`` (B, N) int64 number its
frame through the prompt, its cell in the frame's grid, and its image or video; ``site.videos`` lists
per sample the images and videos as :class:`vtr.core.language_site.VisualSpan` (kind, frames, grid, seconds). A
still image is one frame. Tokens without a cell (newlines, the class token that begins a frame of
Video-LLaVA) have frame and place -1; packed crops and tiles have a frame and place -1. Qwen's temporal
patches (two frames of the file) are one frame. InternVL, SmolVLM and prompts of many images give frames
as still images, which cannot be told from a video: with ``vtr.apply(..., video=True)`` still images of
the same grid that follow one another are the frames of one video.

- ``Stage("logits", 0)``: the logits of every step of ``generate``. At the entry of the language model, before any
  cut, ``ContrastMethod.keep(site)`` chooses the visual tokens that a second run sees, or ``read(site)`` computes what the
  head reads instead of one. Methods that cut in front of the language model cannot be applied beside it.

``reduce`` returns a :class:`vtr.core.method.Reduction` over the visual tokens (``map``, and ``weights`` or
``tokens`` for merging); text is never touched. A merged token takes the place and the position of its
representative. ``Method.positions_at(site)`` decides if kept tokens keep their positions; the option
``positions=`` of ``vtr.apply`` overrides it. With m-RoPE (Qwen) positions are two-dimensional and are
always kept: the option ``"compact"`` is refused there, a method's own preference gives way.

A language model that runs FlashAttention 2 or 3 is refused, with the reason, unless
``vtr.apply(..., flash_attention=True)`` asks for it: what is given to it after a cut is right (no
positions with gaps, which it reads as packed sequences; tested with a probe in its place), but its
results have not been compared on a GPU. SDPA, which has its own flash kernels, always works.

``info.depth`` has ``encoder``, ``prompt`` (1) and ``decoder``; ``info.signals``:
``encoder`` as for the tower alone; ``prompt``: ``hidden``, ``text``, ``encoder_scores`` (``spread``
works); ``decoder``: ``hidden``, ``text``, ``queries``, ``keys``, ``values``, ``text_attention``,
``encoder_scores``. ``info.has_cls``, ``prefix``, ``dim``, ``heads``, ``tokens`` are the tower's;
Further facts are ``last_layer`` (0-based tower layer whose output the projector reads), ``mrope``,
``decoder_middle``, and ``language``, the sizes of the language model.

``info.tokens`` is None if images differ in their number of tokens; ``info.tower_cuts`` is
False if the tower can be looked into but not cut. Qwen's and VideoLLaMA3's towers show all
images and frames padded to the largest, in the order in which their merger reads patches; Idefics3's and
SmolVLM's are not opened.

Prompts without an image, and every decoding step, are never offered to a method. generate with
``use_cache=False`` runs the prompt in every call: what was chosen in the first one holds, so that the answer
is that with a cache; methods at the site ``kv`` are refused there. A plain call without a cache is a new
prompt. Every sample must get the same result in every row that repeats it (beams): their caches are
exchanged.

Files
-----

- the model: ``wrapping`` (its hooks), ``facts`` (known to methods before a call), ``refusals``, ``family`` and
  ``families`` (differences between models), ``arguments`` (of a call), ``nesting`` (calls inside calls,
  compiled code), ``costs``;
- models that are not named: ``generic`` (their structure), ``twin`` and ``twin_prompts`` (tiny models of a class, and
  prompts for them), ``proof`` (what is proven on a twin before a class is wrapped);
- its towers: ``tower_calls`` (features of images and videos), ``pictures`` (smaller ones), ``tower`` and
  ``packed`` (methods inside), ``features`` and ``spreads`` (from patches to visual tokens), ``frames`` (the
  frame and place of each token), ``placeholders`` (their places in a prompt);
- its language model: ``language`` (hooks), ``prompt`` (cuts at the entry), ``call`` (one call, and its cuts),
  ``visit`` and ``rows`` (the view of methods on it), ``middle`` (cuts between the halves of a layer), ``sequence``
  (padded batches), ``attention`` (q, k, v of a few tokens), ``deepstack`` (Qwen3-VL), ``cache`` (the
  record of cuts in a KV cache), ``masks`` (layers of several kinds), ``attending`` (methods inside the attention) and ``marks`` (what is visual in a
  cache), ``kv`` and ``store`` (the entries of a cache), ``uncached`` and ``drafts``
  (generate without a cache, and with a draft model), ``recompute`` (gradient checkpointing);
- the outputs: ``head`` (logits and loss), ``outputs`` (their columns), ``contrast`` and ``branch`` (the logits of
  generate against those of a second run).

Models that are not named
-------------------------

A model of any other class of transformers that has a tower with ``get_image_features``, a language model with a list
of layers, and one placeholder for each visual token is proven when it is wrapped: on a twin of the same class and
options with tiny sizes, on the CPU, once per class and options (:mod:`vtr.vision.vlm.proof`). If the outputs after a cut
are not those that they must be, the model is refused with the part that differs. Its tower is not opened.

Layers of several kinds
-----------------------

In layers with sliding windows a window counts the columns that the caller gave: a token sees what it saw, without what
was dropped, and no older ones. If the tokens of a picture see one another (Gemma 3, PaliGemma), those that are left do.
Layers with a recurrent state or a convolution (Qwen3.5, LFM2) run on what is left as on a shorter prompt. Methods inside
attention, at the KV cache and on logits are refused where their own masks would have to be built otherwise.

Training
--------

Layers that transformers checkpoints (``model.gradient_checkpointing_enable()``, from 5.24 on
``activation_checkpointing_enable()``) run again with the sequence that they had: gradients are those without
it. Methods may be removed before the backward pass unless they cut inside layers; those merge by values
with gradients only without ``use_reentrant``. The caller's own checkpoints around layers are refused.

Other calls
-----------

Threads may call a wrapped model at the same time; a call inside its own call (in a hook, say) is refused. A model
that ``torch.compile`` has compiled before ``apply`` is compiled again (code compiled without hooks would
not see them). Image features that the caller gives (``mm_encoder_outputs``, ``image_hidden_states``)
are cut like others, but methods that look into the tower refuse them, and which image a token belongs to
is not known: a budget per image is then one of the sample. Embeddings in which the caller has put the
features, without pixels, show no visual tokens: such a call is dense.

Outputs
-------

With ``output="aligned"`` (the default) outputs have the columns that the caller gave: logits,
``last_hidden_state`` and ``hidden_states`` (each layer's, by what was left there) of a token are in
the column of its id in ``input_ids``, as are ``attention_mask``, ``labels`` and completions. Columns of padding
and of visual tokens that were cut hold zeros. So log-probabilities that are read as
``logits[:, -(k + 1):-1]``, states of the last token found by ``attention_mask`` and heads that do so are
those of each sample alone, whatever side padding is on; and ``logits_to_keep``, a number or a tensor of
columns, counts columns of the caller. A text token behind visual tokens of which the last was cut has zeros
before it, a uniform prediction: score answers, which begin behind a text token.

``labels=`` give the loss of the tokens that are left, each predicted by the one left before it, which is what
each sample gives alone; they cannot be combined with ``logits_to_keep``. The head runs on the tokens that are
left, and its logits are put into their columns afterwards: (B, L, V) as without a method.

With ``output="reduced"`` outputs have the columns that are left, padded anew on the side of the prompt's
padding (on the left if one logit is kept), and ``handle.columns`` says which columns they were. It saves
the memory of full-length logits. All methods of a model have one of the two.

generate reads the last column only, and the language model hands it no more than that in either way: each
sample's last token, also of prompts padded right. ``hidden_states`` of generate are aligned as elsewhere.
``attentions`` are always those of the tokens that were left in each layer. In a later turn on a cache the
columns are those of that turn.

The KV cache
------------

A KV cache that was cut can only be continued while a method is applied. Its ``get_seq_length()`` counts
the tokens that were given, ``get_seq_length(layer)`` those that came into a layer; which of them its cache
holds by KV head is known to :mod:`vtr.vision.vlm.store` alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vtr.compat.around import unwrapped
from vtr.vision.vlm.families import NAMES, family_of, inner_of
from vtr.vision.vlm.wrapping import VLMWrapping

FAMILIES = tuple(f"transformers {name}" for name in NAMES)


def locate(target: Any) -> nn.Module | None:
    """The VLM in ``target`` (a model with or without its head, or a pipeline), None if it is none.

    Raises:
        UnsupportedModelError: a VLM that cannot be supported, with the reason.
    """
    model = target
    if not isinstance(target, nn.Module):
        model = unwrapped(getattr(target, "model", None))
    inner = inner_of(model)
    if inner is None or family_of(inner, model) is None:
        return None
    return model


def wrap(root: Any) -> VLMWrapping:
    inner = inner_of(root)
    assert inner is not None
    family = family_of(inner, root)
    assert family is not None
    return VLMWrapping(root, inner, family)
