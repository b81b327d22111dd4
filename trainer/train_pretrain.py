"""Pretraining: next-token loss on plain text, from random weights.

Long texts are split into rows, short ones share a row without seeing each other.

    python trainer/train_pretrain.py --data_path dataset/sample/pretrain.jsonl --preset tiny --batch_size 4
    python trainer/train_pretrain.py --data_path dataset/pretrain_hq.jsonl --val_path dataset/pretrain_val.jsonl
    torchrun --nproc_per_node 4 trainer/train_pretrain.py
    python trainer/train_pretrain.py --from_resume 1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import PretrainDataset
from trainer.arguments import ROOT, STOPPED, friendly_errors, model_config, stage_parser
from trainer.regression import check_prompt_files, check_regression, show_samples
from trainer.rows import open_rows
from trainer.train_run import TrainRun
from trainer.trainer_utils import init_environment, init_model


def parse_args(argv=None):
    parser = stage_parser(
        "Pretrain",
        save_weight="pretrain",
        from_weight="none",
        data_path=ROOT / "dataset" / "pretrain_hq.jsonl",
        epochs=1,
        batch_size=32,
        learning_rate=1e-3,
        max_seq_len=340,
    )
    return parser.parse_args(argv)


def compute_loss(model, batch):
    """(summed next-token loss, their number, balance loss) of one batch: for training and validation alike."""
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
    show_samples(run, chat=False)
    check_regression(run, chat=False)


def main(args):
    init_environment(args)
    check_prompt_files(args)
    lm_config = model_config(args)
    model, tokenizer = init_model(lm_config, args.from_weight, args.tokenizer_path, args.save_dir, args.device)

    dataset, val_dataset, collate = open_rows(args, tokenizer, PretrainDataset)

    with TrainRun(args, lm_config, model, dataset, collate, val_dataset, tokenizer) as run:
        for epoch in run.epochs():
            train_epoch(epoch, run)


if __name__ == "__main__":
    with friendly_errors(stopped=STOPPED):
        main(parse_args())
