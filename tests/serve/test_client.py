"""The server as the official client of OpenAI sees it, beside generate."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import vtr
from tests.serve.conftest import ask


def generated(twin, method, picture, question, **options):
    """What the wrapped model answers by its own generate."""
    model, processor = twin
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)
    options = {"max_new_tokens": 16, "do_sample": False, **options}
    with torch.inference_mode():
        if method is None:
            out = model.generate(**inputs, **options)
        else:
            with vtr.apply(model, method, positions="original"):
                out = model.generate(**inputs, **options)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def text_of(stream) -> str:
    return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)


WANTED = {
    "default": (None, vtr.FlowCut(keep=36)),
    "dense": ({"method": "dense"}, None),
    "keep": ({"keep": 9}, vtr.FlowCut(keep=9)),
    "vision-zip": ({"method": "visionzip", "keep": 24}, vtr.VisionZip(keep=24)),
    "decoder": ({"method": "fastv", "keep": 18, "options": {"layer": 2}}, vtr.FastV(18, layer=2)),
}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_answers_equal_those_of_generate(served, twin, samples, wanted):
    field, method = wanted
    extra = {} if field is None else {"extra_body": {"vtr": field}}
    for sample in samples[:4]:
        request = {
            "model": "digits-llava",
            "messages": ask(sample.image, sample.question),
            "max_tokens": 16,
            "temperature": 0,
            **extra,
        }
        expected = generated(twin, method, sample.image, sample.question)
        whole = served.client.chat.completions.create(**request)
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].finish_reason == "stop"
        assert text_of(served.client.chat.completions.create(**request, stream=True)) == expected
        ours = whole.usage.model_extra["vtr"]
        assert ours["visual_tokens_before"] == 144
        assert ours["visual_tokens_after"] == (144 if method is None else method.keep)


def test_concurrent_requests_keep_their_methods(served, twin, samples):
    keys = list(WANTED) * 4

    def go(i: int) -> tuple[str, int]:
        field, _ = WANTED[keys[i]]
        sample = samples[i % len(samples)]
        answer = served.client.chat.completions.create(
            model="digits-llava",
            messages=ask(sample.image, sample.question),
            max_tokens=16,
            extra_body={} if field is None else {"vtr": field},
        )
        left = answer.usage.model_extra["vtr"]["visual_tokens_after"]
        return answer.choices[0].message.content, left

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(go, range(len(keys))))
    for i, key in enumerate(keys):
        method, sample = WANTED[key][1], samples[i % len(samples)]
        expected = generated(twin, method, sample.image, sample.question)
        assert found[i] == (expected, 144 if method is None else method.keep)


def test_length_stop_and_usage(served, twin, samples):
    sample = samples[0]
    request = {"model": "digits-llava", "messages": ask(sample.image, sample.question)}
    create = served.client.chat.completions.create
    method = vtr.FlowCut(keep=36)
    one = create(**request, max_completion_tokens=1)
    assert one.choices[0].finish_reason == "length" and one.usage.completion_tokens == 1
    assert one.choices[0].message.content == generated(
        twin, method, sample.image, sample.question, max_new_tokens=1
    )
    whole = create(**request).choices[0].message.content
    first, second = whole.split()
    assert create(**request, stop=f" {second}").choices[0].message.content == first
    stopped = list(
        create(**request, stop=[second], stream=True, stream_options={"include_usage": True})
    )
    assert text_of(stopped) == f"{first} "
    assert stopped[-1].choices == [] and stopped[-1].usage.prompt_tokens == one.usage.prompt_tokens
    assert stopped[-2].choices[0].finish_reason == "stop"


def test_a_seed_repeats_a_drawn_answer(served, samples):
    sample = samples[0]

    def draw(seed):
        return (
            served.client.chat.completions.create(
                model="digits-llava",
                messages=ask(sample.image, sample.question),
                temperature=2,
                top_p=1,
                seed=seed,
                max_tokens=12,
            )
            .choices[0]
            .message.content
        )

    drawn = [draw(seed) for seed in range(8)]
    assert drawn == [draw(seed) for seed in range(8)]
    assert len(set(drawn)) > 1


def test_turns_and_several_pictures(served, samples):
    first, second = samples[0], samples[5]
    messages = [
        {"role": "system", "content": "which digit is there ?"},
        *ask(first.image, first.question),
        {"role": "assistant", "content": first.answer},
        *ask(second.image, second.question),
    ]
    answer = served.client.chat.completions.create(
        model="digits-llava", messages=messages, max_tokens=4
    )
    assert answer.usage.model_extra["vtr"]["visual_tokens_before"] == 288
    # Two of them in one message, and five, which are longer than the context.
    many = ask(first.image, "how many digits are there ?")
    many[0]["content"].insert(0, many[0]["content"][0])
    answer = served.client.chat.completions.create(
        model="digits-llava", messages=many, max_tokens=4
    )
    assert answer.usage.model_extra["vtr"]["visual_tokens_before"] == 288
    many[0]["content"] = many[0]["content"][:1] * 5 + many[0]["content"][-1:]
    with pytest.raises(openai.BadRequestError, match="context"):
        served.client.chat.completions.create(model="digits-llava", messages=many)


def test_models_and_health(served):
    assert [m.id for m in served.client.models.list()] == ["digits-llava"]
    assert served.client.models.retrieve("digits-llava").id == "digits-llava"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other/model")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


def numbers(served) -> dict[str, float]:
    text = httpx.get(f"{served.url}/metrics").text
    return {
        s.name + "".join(v for k, v in s.labels.items() if k == "status"): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_metrics_count_requests_and_tokens(served, samples):
    before = numbers(served)
    request = {
        "model": "digits-llava",
        "messages": ask(samples[0].image, "how many digits are there ?"),
    }
    usage = served.client.chat.completions.create(**request).usage
    with pytest.raises(openai.BadRequestError):
        served.client.chat.completions.create(**request, n=2)
    after = numbers(served)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["vtr_requests_total200"] == 1 and grown["vtr_requests_total400"] == 1
    assert grown["vtr_visual_tokens_before_total"] == 144
    assert grown["vtr_visual_tokens_after_total"] == 36
    assert grown["vtr_prompt_tokens_total"] == usage.prompt_tokens
    assert grown["vtr_completion_tokens_total"] == usage.completion_tokens
    assert grown["vtr_time_to_first_token_seconds_count"] == 1
    assert after["vtr_requests_in_flight"] == 0
