"""One system, one row of the benchmark, in a process of its own: `measure.py prepare ROW` or `measure.py SYSTEM ROW`.

Every system trains through TRL's SFTTrainer on the same NF4 checkpoint and the same random tokens, all supervised, with
AdamW 8-bit, rank 16 on seven linears, bf16. A step's time is taken with the GPU idle at both ends. Prints one JSON
line: tokens per second (median of the steps after warm-up), their spread, peak memory, first step, gradient norm.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
FOLDER = Path(os.environ.get("FINETUNE_BENCH_FOLDER", tempfile.gettempdir() + "/finetune-bench"))
WARM_UP, STEPS, SEED = 3, 6, 3407
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Row:
    """A shape of model and batch."""

    model: str
    length: int
    batch: int
    accumulation: int

    @property
    def tokens(self) -> int:
        """Tokens per optimiser step."""
        return self.length * self.batch * self.accumulation


SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 64, "tie_word_embeddings": True},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 151936, "head_dim": 128},
}  # fmt: skip
ROWS = {
    "8b-2048-bs2-ga4": Row("llama-8b", 2048, 2, 4),
    "8b-8192-bs1-ga2": Row("llama-8b", 8192, 1, 2),
    "1b-2048-bs4-ga2": Row("llama-1b", 2048, 4, 2),
    "qwen3-8b-2048-bs2-ga4": Row("qwen3-8b", 2048, 2, 4),
}


def prepare(name: str) -> None:
    """Write the row's model, random and already in NF4, with a small tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen3Config

    folder = FOLDER / ROWS[name].model
    if (folder / "config.json").exists():
        return
    kind = Qwen3Config if "qwen3" in folder.name else LlamaConfig
    config = kind(
        **SHAPES[folder.name], max_position_embeddings=131072, rope_theta=500000.0, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    plain = FOLDER / "plain"
    model.save_pretrained(plain)
    del model
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    options = {"quantization_config": nf4, "dtype": torch.bfloat16, "device_map": {"": 0}}
    AutoModelForCausalLM.from_pretrained(plain, **options).save_pretrained(folder)
    for file in plain.iterdir():
        file.unlink()
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=131072,
        **dict(zip(("bos_token", "eos_token", "pad_token"), alphabet[:3], strict=True)),
    )


def dataset(row: Row) -> Any:
    """Random rows of the full length."""
    import torch
    from datasets import Dataset

    count = row.batch * row.accumulation * (WARM_UP + STEPS)
    tokens = torch.randint(3, 256, (count, row.length), generator=torch.Generator().manual_seed(SEED)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def trl_options(row: Row, *, recompute: bool) -> dict[str, Any]:
    """SFTConfig's fields, the same for every peer."""
    return {
        "output_dir": str(FOLDER / "out"), "max_steps": WARM_UP + STEPS, "per_device_train_batch_size": row.batch,
        "gradient_accumulation_steps": row.accumulation, "learning_rate": 2e-4, "optim": "adamw_8bit", "bf16": True,
        "weight_decay": 0.01, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": SEED,
        "max_length": row.length, "packing": False, "gradient_checkpointing": recompute, "disable_tqdm": True,
        "dataset_num_proc": None,
    }  # fmt: skip


def peer(system: str, row: Row, folder: Path) -> Any:
    """A trainer of transformers, TRL and peft alone; `liger` adds its kernels."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0})
    options = trl_options(row, recompute=system != "hf-no-checkpointing")
    return SFTTrainer(
        model=model, args=SFTConfig(**options, use_liger_kernel=system == "liger"), train_dataset=dataset(row),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM"),
    )  # fmt: skip


def unsloth(system: str, row: Row, folder: Path) -> Any:
    """Unsloth as its documentation sets it up; `unsloth-max` keeps all layers' activations."""
    if system == "unsloth-max":
        os.environ["UNSLOTH_GC_KEEP_LAYERS"] = "max"
    import torch
    from unsloth import FastLanguageModel

    from trl import SFTConfig, SFTTrainer  # isort: skip  # Unsloth patches TRL when it is imported

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=row.length, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=LINEARS, random_state=SEED,
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    options = trl_options(row, recompute=True)
    del options["gradient_checkpointing"]
    return SFTTrainer(model=model, args=SFTConfig(**options), train_dataset=dataset(row), processing_class=tokenizer)


def ours(system: str, row: Row, folder: Path) -> Any:
    """This project's trainer, as a job runs it."""
    import logging

    import torch
    from transformers import AutoTokenizer

    from finetune_api.run_config import RunConfig
    from finetune_api.vocabulary import Precision
    from finetune_trainer.adapter_injection import inject_adapter
    from finetune_trainer.engine import prepare_engine
    from finetune_trainer.model_loading import load_model
    from finetune_trainer.training import QloraTrainer
    from finetune_trainer.training_configuration import configure_training

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    memory = {"ours-smallest": "Smallest", "ours-balanced": "Balanced"}.get(system, "Fastest")
    config = RunConfig.model_validate(
        {
            "apiVersion": "finetune.dev/v1alpha1", "kind": "RunConfig",
            "job": {"namespace": "bench", "name": "bench", "uid": "bench"},
            "model": {"source": f"file://{folder}", "maxSequenceLength": row.length},
            "dataset": {"source": "file:///none.jsonl", "packing": False}, "adapter": {"rank": 16, "alpha": 16},
            "training": {
                "maxSteps": WARM_UP + STEPS, "batchSize": row.batch, "gradientAccumulation": row.accumulation,
                "memory": memory, "checkpointSteps": 100_000, "seed": SEED,
            },
            "export": {"merged": "None", "gguf": []}, "output": {"s3": {"bucket": "models"}}, "checkpointsToKeep": 1,
            "terminationGracePeriodSeconds": 60, "gpus": 1,
        }
    )  # fmt: skip
    loaded = load_model(folder, config.model, Precision.AUTO, gpus=1)
    adapted = inject_adapter(loaded.model, config.adapter, SEED)
    engine = prepare_engine(adapted.model, loaded, config)
    arguments = configure_training(
        config, loaded, FOLDER / "out", evaluates=False, recompute=engine.recompute_activations
    )
    trainer = QloraTrainer(
        model=adapted.model, engine=engine, args=arguments, train_dataset=dataset(row),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.planned = engine.plan.peak_bytes if engine.plan else None
    torch.cuda.reset_peak_memory_stats()
    return trainer


def measure(system: str, name: str) -> dict[str, Any]:
    """Train, and time each step."""
    row, folder = ROWS[name], FOLDER / ROWS[name].model
    build = ours if system.startswith("ours") else unsloth if system.startswith("unsloth") else peer
    trainer = build(system, row, folder)
    import torch
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            torch.cuda.synchronize()
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if len(norms) < WARM_UP + STEPS or not min(norms) > 0:
        raise RuntimeError(f"{system} learned nothing: gradient norms {norms}")
    times = [last - first for first, last in pairwise(ends)]
    rates = [row.tokens / seconds for seconds in times[WARM_UP:]]
    return {
        "row": name, "system": system, "tokens_per_second": round(statistics.median(rates), 1),
        "spread": round((max(rates) - min(rates)) / statistics.median(rates), 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "first_step_s": round(times[0], 2),
        "grad_norm": round(statistics.median(norms), 4), "loss": round(losses[-1], 4),
        "planned_gib": round(trainer.planned / 2**30, 2) if getattr(trainer, "planned", None) else None,
        "gpu": torch.cuda.get_device_name(),
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(sys.argv[2])
    else:
        sys.stdout.write("RESULT " + json.dumps(measure(sys.argv[1], sys.argv[2])) + "\n")
