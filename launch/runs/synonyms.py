"""What keys are called elsewhere: by torchrun, by Slurm, and by the training libraries that people come from.

Owns the table, from which the refusal of an unknown key or flag proposes ours. Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection

ELSEWHERE = {
    # torchrun, Lightning
    "nodes": "nnodes num_nodes n_nodes",
    "ranks_per_node": "nproc_per_node ntasks_per_node tasks_per_node gpus_per_task devices num_gpus num_processes",
    "resilience.rendezvous_timeout_s": "rdzv_timeout join_timeout",
    # sbatch
    "cluster.timeout_min": "time time_limit time_limit_min timelimit time_min timeout walltime wall_time",
    "cluster.mem_gb=VALUE": "mem memory mem_per_node",
    "cluster.partition": "queue",
    "cluster.account": "allocation",
    "cluster.array_parallelism": "max_parallel max_jobs",
    "cluster.cpus_per_task": "cpus num_cpus cpus_per_gpu",
    "cluster.gpus_per_node": "gres_gpus gpu_per_node",
    "cluster.srun_args": "srun_flags",
    "cluster.additional_parameters": "sbatch_args slurm_args",
    "name": "job_name run_name experiment_name",
    # nanoGPT, Megatron-LM, torchtitan, transformers, Lightning, DeepSpeed
    "output_dir": "out_dir save_dir dump_folder default_root_dir",
    "resume_from": "resume resume_from_checkpoint ckpt_path",
    "init_from": "pretrained initial_load_path",
    "precision": "dtype mixed_precision mixed_precision_param torch_dtype",
    "precision=bf16": "bf16",
    "precision=fp16": "fp16",
    "tf32": "allow_tf32",
    "compile=default": "torch_compile use_compile",
    "recompute": "activation_checkpoint activation_checkpointing recompute_activations recompute_granularity",
    "recompute=full": "gradient_checkpointing use_gradient_checkpointing",
    "optim.lr": "learning_rate base_lr max_lr",
    "optim.min_lr": "min_learning_rate",
    "optim.max_steps": "steps num_steps train_steps total_steps max_train_steps max_iters train_iters iterations",
    "optim.max_steps=VALUE": "epochs num_epochs max_epochs num_train_epochs",
    "optim.max_tokens": "train_tokens total_tokens num_tokens token_budget",
    "optim.global_batch": "batch_size global_batch_size train_batch_size total_batch_size bs",
    "optim.max_micro_batch": (
        "micro_batch_size local_batch_size per_device_train_batch_size per_device_batch_size device_batch_size "
        "train_micro_batch_size_per_gpu mbs"
    ),
    "optim.max_micro_batch=VALUE": "gradient_accumulation_steps grad_accum_steps accumulate_grad_batches grad_accum",
    "optim.warmup_steps": "warmup warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps",
    "optim.grad_clip": "clip_grad max_grad_norm max_norm gradient_clipping gradient_clip_val clip",
    "optim.weight_decay": "wd",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_eps adam_epsilon",
    "model.n_layer": "num_layers layers n_layers num_hidden_layers depth",
    "model.n_head": "num_heads heads n_heads num_attention_heads",
    "model.n_kv_head": "num_kv_heads n_kv_heads num_key_value_heads num_query_groups",
    "model.n_embd": "hidden_size d_model dim embed_dim width n_embed",
    "model.ffn_hidden": "ffn_hidden_size intermediate_size d_ff",
    "model.block_size": "seq_len seq_length sequence_length max_seq_len context_length context_size max_length",
    "model.n_expert": "num_experts experts",
    "model.n_expert_per_token": "top_k moe_router_topk num_experts_per_tok",
    "model.rope_base": "rope_theta",
    "model.vocab_multiple": "make_vocab_size_divisible_by",
    "parallel.tp": "tensor tensor_parallel tensor_parallel_size tensor_parallel_degree tensor_model_parallel_size",
    "parallel.pp": "pipeline pipeline_parallel pipeline_parallel_size pipeline_parallel_degree "
    "pipeline_model_parallel_size",
    "parallel.cp": "context_parallel context_parallel_size context_parallel_degree",
    "parallel.ep": "expert_parallel expert_parallel_size expert_parallel_degree expert_model_parallel_size",
    "parallel.dp_shard": "fsdp_size data_parallel_shard_degree",
    "parallel.schedule": "pipeline_parallel_schedule",
    "parallel.cpu_offload": "offload",
    "eval.interval": "eval_interval eval_steps val_interval val_check_interval",
    "eval.sequences": "eval_iters eval_samples",
    "checkpoint.interval": "save_interval save_steps checkpoint_interval checkpoint_every save_every",
    "checkpoint.keep_last": "save_total_limit keep_latest_k save_top_k",
    "checkpoint.asynchronous": "async_mode async_save async_checkpoint",
    "logging.wandb": "wandb_log use_wandb enable_wandb",
    "logging.console_interval_s=VALUE": "log_interval logging_steps log_freq log_every",
    "data.path": "data_path train_data train_file",
    "data.dataset": "dataset_name hf_dataset",
    "data.tokenizer": "tokenizer_name tokenizer_type",
}
"""Key of ours, or a whole override where values mean something else -> its names elsewhere, none of which is ours."""
MEANT = {name: ours for ours, names in ELSEWHERE.items() for name in names.split()}


def override_meant(name: str, value: str, keys: Collection[str]) -> tuple[str, str] | None:
    """Return which of ``keys`` is meant by a ``name`` from elsewhere, dotted or not, and its value; else None.

    The value is the one that was typed, unless the two mean different things: then that of the table.
    """
    key, _, other = MEANT.get(name.rpartition(".")[2].lower().replace("-", "_"), "").partition("=")
    return (key, other or value) if key in keys else None
