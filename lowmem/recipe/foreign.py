"""Names that other fine-tuning tools use for what a recipe calls differently.

They are never accepted; they only make `did you mean` right. A name with a dot counts in that section only.
"""

from __future__ import annotations

_OTHER_NAMES = {
    "model.name_or_path": (
        "model.name model.path model.model model.id base_model model_name_or_path model_name model_id "
        "pretrained_model_name_or_path model_path checkpoint_dir tokenizer_name_or_path"
    ),
    "model.dtype": "torch_dtype bf16 fp16 fp32 tf32 precision pure_bf16 compute_dtype half_precision float16",
    "model.weights": (
        "load_in_4bit load_in_8bit quantization quantization_bit quantization_config bnb_4bit_quant_type "
        "quantize quantizer"
    ),
    "model.attn": (
        "attn_implementation flash_attention flash_attn attention sdp_attention use_flash_attention_2 "
        "use_flash_attn xformers_attention _attn_implementation"
    ),
    "model.revision": "model_revision revision_of_model base_model_revision",
    "lora.r": "lora.rank lora_r lora_rank adapter_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target": "lora_target lora_target_modules target_modules lora_target_linear lora_attn_modules",
    "lora": "adapter peft peft_config use_peft use_lora finetuning_type",
    "data.train.path": (
        "data.path data.file data.train.file data.train.filename data.train.url train_file data_files "
        "dataset_path data_path train_path dataset_dir train_data"
    ),
    "data.train.hub": (
        "data.train.dataset data.train.id data.train.repo dataset datasets dataset_name dataset_id hf_dataset"
    ),
    "data.train.format": "data.train.type dataset_format ds_type data_format",
    "data.train.take": (
        "data.train.rows data.train.limit data.train.num_rows max_samples max_train_samples num_samples "
        "n_samples limit"
    ),
    "data.eval": (
        "eval.data eval.dataset eval.path data.test data.validation data.valid data.held_out val_set_size "
        "val_size test_datasets eval_dataset validation_file eval_file val_file validation_data val_data "
        "dataset_valid eval_data"
    ),
    "data.template": "chat_template prompt_template prompt_style",
    "data.train_on": (
        "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss mask_prompt "
        "train_on_source mask_history roles_to_train"
    ),
    "data.max_length": (
        "max_seq_length max_seq_len cutoff_len sequence_len seq_len seq_length sequence_length block_size "
        "model_max_length context_length max_tokens"
    ),
    "data.packing": "sample_packing neat_packing pack packed pack_dataset use_packing",
    "optimizer.name": (
        "optimizer.type optimizer.optimizer optimizer.algorithm optim optimizer_name optim_name "
        "optimizer_type use_galore use_apollo use_badam"
    ),
    "optimizer.lr": "learning_rate base_lr max_lr peak_lr step_size",
    "optimizer.weight_decay": "wd decay",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "optimizer.eps": "adam_epsilon adam_eps epsilon",
    "optimizer.rank": "galore_rank apollo_rank projection_rank",
    "optimizer.refresh_every": (
        "update_proj_gap galore_update_interval galore_update_proj_gap apollo_update_interval "
        "subspace_update_interval update_gap t_update"
    ),
    "optimizer.scale": "galore_scale apollo_scale",
    "optimizer.target": "optim_target_modules galore_target galore_target_modules apollo_target",
    "train.epochs": "num_train_epochs num_epochs n_epochs max_epochs epoch",
    "train.max_steps": "max_train_steps num_training_steps total_steps max_iters num_steps steps",
    "train.per_device_batch_size": (
        "per_device_train_batch_size micro_batch_size batch_size train_batch_size device_batch_size "
        "train_micro_batch_size_per_gpu mini_batch_size"
    ),
    "train.gradient_accumulation_steps": (
        "gradient_accumulation grad_accum accumulate_grad_batches gradient_accumulation_iters "
        "grad_accum_steps"
    ),
    "train.max_grad_norm": "gradient_clipping grad_clip clip_grad_norm gradient_clip_val max_norm clip_grad",
    "train.lr_scheduler.name": (
        "lr_scheduler_type scheduler_type scheduler lr_schedule schedule lr_decay_style"
    ),
    "train.lr_scheduler.warmup_steps": "num_warmup_steps lr_warmup_steps",
    "train.lr_scheduler.warmup_ratio": "warmup warmup_fraction",
    "train.activation_checkpointing": (
        "gradient_checkpointing enable_activation_checkpointing use_gradient_checkpointing "
        "checkpoint_activations disable_gradient_checkpointing"
    ),
    "train.loss": "use_liger_kernel enable_liger_kernel chunked_ce cut_cross_entropy fused_cross_entropy",
    "train.seed": "random_seed data_seed manual_seed",
    "eval.every": (
        "eval.steps eval.interval eval.frequency eval_steps eval_interval eval_strategy evaluation_strategy "
        "evals_per_epoch val_interval"
    ),
    "eval.batch_size": "per_device_eval_batch_size eval_batch_size",
    "eval.at_start": "eval_on_start",
    "eval.loss_only": "predict_with_generate prediction_loss_only",
    "save.dir": (
        "save.directory save.folder save.path save.output save.to output_dir out_dir save_dir run_dir"
    ),
    "save.every": (
        "save.steps save.interval save.frequency save_steps save_interval save_strategy saves_per_epoch "
        "checkpointing_steps"
    ),
    "save.keep": "save_total_limit keep_last_n_checkpoints keep_last",
    "save.merge_lora": "merge merge_adapter merge_and_unload",
    "resume": "resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir",
    "report.log_every": (
        "report.every report.steps report.interval train.log_every logging_steps log_every_n_steps "
        "log_interval"
    ),
}

FOREIGN_NAMES = {name: ours for ours, names in _OTHER_NAMES.items() for name in names.split()}
