r"""Train a small model with the Trainer of the transformers library, which talks to the launcher through a callback.

On one node and on two, typed in the root of the checkout; ends in a scaling table. Needs transformers and accelerate:

    python -m launch -m nodes=1,2 ranks_per_node=1 workload=script script.path=examples/transformers_trainer.py \
        script.options.max_steps=200 script.max_steps=200 script.resumes=true script.weak_scaling=true

``LauncherCallback`` goes with any Trainer: copy it.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from launch import worker


class LauncherCallback(TrainerCallback):
    """Tell the launcher of steps and checkpoints, and have the Trainer save and leave when the launcher asks.

    The ranks stop at the same step by themselves under the launcher, and as a single process; not under torchrun alone.
    """

    def __init__(self, run: worker.Run) -> None:
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask the launcher, once a step on every rank."""
        stop, save_now = self.run.stop_requested(), self.run.save_requested()
        control.should_save |= stop or save_now
        control.should_training_stop |= stop
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record the figures of a step; the summary at the end has no loss of a step."""
        if logs and "loss" in logs:
            samples = args.per_device_train_batch_size * args.gradient_accumulation_steps
            figures = {"loss": logs["loss"], "lr": logs.get("learning_rate"), "grad_norm": logs.get("grad_norm")}
            self.run.record(state.global_step, samples=samples, **figures)
        if control.should_save:  # the save comes right after this
            self.run.phase("saving", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say that the checkpoint is on the disk."""
        self.run.saved(state.global_step)


class CountingSequences(torch.utils.data.Dataset):
    """Sequences of 32 tokens that count up from a random one."""

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first = torch.randint(256, (1,), generator=torch.Generator().manual_seed(index))
        tokens = (first + torch.arange(32)) % 256
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    """Train from the newest checkpoint, if there is one."""
    run = worker.attach()
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--save_steps", type=int, default=50)
    options = parser.parse_args()

    folder = run.checkpoint_dir or Path("checkpoints")
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.max_steps,
        save_steps=options.save_steps,
        per_device_train_batch_size=8,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",  # the launcher draws the curves
        use_cpu=not torch.cuda.is_available(),
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=2, n_head=4))
    trainer = Trainer(model=model, args=settings, train_dataset=CountingSequences(), callbacks=[LauncherCallback(run)])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)


if __name__ == "__main__":
    main()
