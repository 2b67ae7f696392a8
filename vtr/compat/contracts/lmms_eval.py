"""Expectations of lmms-eval."""

from __future__ import annotations

from vtr.compat.contract import Expectation
from vtr.compat.lmms_eval import PADDING

_MODEL, _RUNNER = "vtr/evaluate/model.py", "vtr/evaluate/runner.py"

CONTRACT = (
    Expectation("lmms_eval.api.instance:GenerationResult", _MODEL, starts=("text", "token_counts")),
    Expectation("lmms_eval.api.instance:TokenCounts", _MODEL, takes=("input_tokens", "output_tokens")),
    Expectation(
        "lmms_eval.api.instance:Instance", _MODEL, has=("args",), takes=("arguments", "metadata", "idx")
    ),
    Expectation(
        "lmms_eval.api.model:lmms",
        _MODEL,
        has=("generate_until", "generate_until_multi_round", "loglikelihood", "clean", "is_simple"),
        calls=("_rank", "_world_size", "task_dict"),
    ),
    Expectation(
        "lmms_eval.models.registry_v2:ModelManifest",
        "vtr/evaluate/plugin.py",
        takes=("model_id", "chat_class_path", "simple_class_path"),
    ),
    Expectation(
        "lmms_eval.models:MODEL_REGISTRY_V2.register_manifest",
        "vtr/evaluate/plugin.py",
        takes=("manifest", "overwrite"),
    ),
    Expectation(
        "lmms_eval.tasks:TaskManager",
        "vtr/evaluate/official.py",
        has=("task_index",),
        starts=("verbosity",),
        takes=("include_path", "include_defaults", "model_name"),
    ),
    Expectation("lmms_eval.tasks:get_task_dict", _RUNNER, starts=("task_name_list", "task_manager", "task_type")),
    Expectation(
        "lmms_eval.evaluator:simple_evaluate",
        _RUNNER,
        takes=(
            *("model", "tasks", "batch_size", "device", "task_manager", "limit", "bootstrap_iters"),
            *("log_samples", "random_seed", "numpy_random_seed", "torch_random_seed"),
            *("fewshot_random_seed", "verbosity", "cli_args"),
        ),
        calls=("task_dict",),
    ),
    Expectation("lmms_eval.evaluator:tqdm", _RUNNER),
    Expectation("lmms_eval.evaluator:_clone_padding_request", _MODEL, calls=(PADDING,)),
    Expectation("lmms_eval.evaluator:evaluate", _MODEL, calls=("clean",)),
    Expectation("lmms_eval.api.task:ConfigurableTask.construct_requests", "vtr/evaluate/prompts.py", calls=("doc_to_visual",)),
    Expectation("lmms_eval.api.task:ConfigurableMessagesTask.construct_requests", "vtr/evaluate/prompts.py", calls=("doc_to_messages",)),
    Expectation("lmms_eval.utils:load_yaml_config", "vtr/evaluate/judged_tasks.py", takes=("yaml_path", "mode")),
)  # fmt: skip
