"""What users of TRL write out of habit, and what stands for it here; a nearest name would mislead them."""

from __future__ import annotations

# Another name for the same thing.
RENAMED = {
    "model_name_or_path": "model",
    "dataset_name": "train_data",
    "dataset_train_split": "train_split",
    "dataset_test_split": "eval_split",
    "train_dataset": "train_data",
    "eval_dataset": "eval_data",
    "train_file": "train_data",
    "data": "train_data",
    "dataset": "train_data",
    "lora_r": "expert_rank",
    "lora_rank": "expert_rank",
    "per_device_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "rpo_alpha": "sft_weight",
    "lr": "learning_rate",
}

_REFERENCE = "the frozen base is the reference, and its log-probabilities come from the same pass"
_LORA = "LoRA is part of an expert: branch_depth says in which blocks, expert_rank and lora_alpha how large"
_TARGETS = "LoRA goes into every linear layer of the last branch_depth blocks (-1: all)"
_LOSS = "the loss is the mixture's evidence bound over one loss_type (at num_experts 1: it); sft_weight adds 'sft'"
_LENGTH = "max_length bounds prompt and completion together; truncation_mode says which end stays"
_QUANTIZED = "load_in_8bit and load_in_4bit are all there is to choose"
_DATA = "train_data and eval_data are files, folders or hub names"
_LAYOUT = "not needed: every distinct text is read once and batches are packed"

# No such thing here, and what there is instead.
EXPLAINED = {
    **dict.fromkeys(
        (
            *("ref_model", "ref_model_init_kwargs", "ref_adapter_name", "model_adapter_name", "force_use_ref_model"),
            *("precompute_ref_batch_size", "reference_free"),
            *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        ),
        f"not needed: {_REFERENCE}",
    ),
    **dict.fromkeys(("peft_config", "use_peft", "lora_task_type"), _LORA),
    **dict.fromkeys(("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"), _TARGETS),
    "lora_dropout": "there is no dropout in LoRA here; token_dropout and weight_decay keep experts from memorising",
    **dict.fromkeys(("use_rslora", "use_dora"), "experts are plain LoRA, which every server loads"),
    **dict.fromkeys(
        (
            *("loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"),
            *("use_weighting", "use_weighting_policy", "discopop_tau", "router_aux_loss_coef"),
        ),
        _LOSS,
    ),
    **dict.fromkeys(("max_prompt_length", "max_completion_length"), _LENGTH),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage", "quantization_config"), _QUANTIZED
    ),
    **dict.fromkeys(("dtype", "torch_dtype", "model_init_kwargs"), "bf16 says in which type the base is loaded"),
    "attn_implementation": "the model's own default attention is used",
    "disable_dropout": "not needed: a frozen trunk runs without dropout, and so do the experts",
    **dict.fromkeys(("padding_free", "pad_to_multiple_of", "packing", "use_logits_to_keep"), _LAYOUT),
    "activation_offloading": "a frozen trunk keeps no activations; with LoRA in blocks: gradient_checkpointing",
    "pad_token": "the tokenizer's own is used; a tokenizer without one is padded by token 0, which is masked",
    "ignore_bias_buffers": "not needed on several processes",
    **dict.fromkeys(
        ("dataset_config", "dataset_streaming", "datasets", "streaming", "test_split_size", "dataset_text_field"), _DATA
    ),
    "dataset_num_proc": "rows are tokenized in one process",
}


def habit(name: str) -> str | None:
    """What to write instead of a name from TRL, or why nothing; None for any other name."""
    if name in RENAMED:
        return f"here it is {RENAMED[name]!r}"
    return EXPLAINED.get(name)
