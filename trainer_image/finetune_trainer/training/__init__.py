"""The parts of a training run that are no stage of their own: what stages 4 and 5 are built from.

engine.py               the chosen loss, micro-batch, memory plan and fused layers of a run
qlora_trainer.py        TRL's trainer with our loss, and a smaller memory plan where memory runs out
callback.py             progress, checks of the loss, checkpoints and samples at the loop's events
checkpointed_state.py   the best adapter, the samples and the metrics, which every checkpoint carries
best_adapter.py         the adapter with the lowest evaluation loss, and early stopping
samples.py              answers to fixed prompts during training
batching/               the arrangement of documents in which none sees another
collator.py             rows of a micro-batch laid end to end with document boundaries, or padded with a mask
losses.py               next-token loss on supervised tokens in plain PyTorch
fp8_gate.py             the decision for or against FP8, by the loss of the first batch
gradients.py            gradients of the adapters: cleared quickly, and restored after half a pass
memory/                 memory that every rank has, and passes for which it runs out
optimizer.py            our 8-bit AdamW and our learning rate's schedule, in place of those that the configuration names
loaded_model.py         the base model as stage 1 loaded it
outcome.py              the result of training, summarised from TRL's log
divergence/             signs that a run has diverged or learned nothing, and checkpoints that are of no use
metrics_log.py          metrics.jsonl, a line for every logged step, which every checkpoint carries
records.py              loss points and sample lines, as the documents read them
"""
