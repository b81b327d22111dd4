"""Full-parameter supervised fine-tuning: next-token loss on the assistant's replies of a conversation.

Which tokens those are comes from the chat template's generation markers, so no text in a row can forge a reply.

    python trainer/train_full_sft.py --data_path dataset/sample/sft.jsonl --from_weight pretrain --batch_size 3
    python trainer/train_full_sft.py --from_weight full_sft --save_weight full_sft_code --data_path dataset/mix.jsonl
    torchrun --nproc_per_node 4 trainer/train_full_sft.py
    python trainer/train_full_sft.py --from_resume 1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import SFTDataset
from trainer.arguments import ROOT, STOPPED, friendly_errors, model_config, stage_parser
from trainer.regression import check_prompt_files, check_regression, show_samples
from trainer.rows import open_rows
from trainer.train_run import TrainRun
from trainer.trainer_utils import init_environment, init_model


def parse_args(argv=None):
    parser = stage_parser(
        "Full SFT",
        save_weight="full_sft",
        from_weight="pretrain",
        data_path=ROOT / "dataset" / "sft_mini_512.jsonl",
        epochs=2,
        batch_size=16,
        learning_rate=1e-3,
        max_seq_len=340,
    )
    parser.add_argument(
        "--train_on", default="all", choices=["all", "last", "system"], help="which replies count; system: its text too"
    )
    return parser.parse_args(argv)


def compute_loss(model, batch):
    """(summed loss of the replies, number of their tokens, balance loss) of one batch: for training and validation."""
    output = model(**batch, return_logits=False)
    return output.loss_sum, output.tokens, output.aux_loss


def train_epoch(epoch, run):
    for step, batch in run.batches(epoch):
        with run.attempt():
            with run.autocast():
                loss_sum, tokens, aux_loss = compute_loss(run.model, batch)
            run.update(loss_sum, tokens, aux_loss)
        run.log(step)
        if run.evaluates(step):
            validate(run)
        run.save(step)


def validate(run):
    with run.evaluating() as total:
        for batch in run.val_batches():
            with run.autocast():
                total.add(*compute_loss(run.model, batch))
    show_samples(run, chat=True)
    check_regression(run, chat=True)


def main(args):
    init_environment(args)
    check_prompt_files(args)
    lm_config = model_config(args)
    model, tokenizer = init_model(lm_config, args.from_weight, args.tokenizer_path, args.save_dir, args.device)

    dataset, val_dataset, collate = open_rows(args, tokenizer, SFTDataset, train_on=args.train_on)

    with TrainRun(args, lm_config, model, dataset, collate, val_dataset, tokenizer) as run:
        for epoch in run.epochs():
            train_epoch(epoch, run)


if __name__ == "__main__":
    with friendly_errors(stopped=STOPPED):
        main(parse_args())
