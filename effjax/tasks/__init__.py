"""Objectives: what a model is trained on and judged by.

A task is `Task(execution, *, <config args>)`, `execution` being the config's execution block, with
  `data`: 'text', 'image' or 'rows', the kind of batch it reads;
  `info(batch, rng, train) -> SeqInfo`;
  `loss(model, batch, info) -> (loss_sum, weight, aux)`: float32 scalars, the loss summed with the
    batch's weights and the sum of those weights; `aux` maps a name to a (sum, weight) pair. The
    step divides once, by the weight over all microbatches and devices;
  `evaluate(model, batch, info) -> {name: (sum, weight)}`;
  `metrics(sums, source) -> {name: float}`: what is reported, given the sums over a split;
  `units(batch_size, seq_len) -> (examples, tokens)`: what one batch counts as on the ledger;
  `cost(model, batch, seq_len) -> {part: Cost}`: one forward pass of the model as the task uses it;
  `bidirectional`, where it is True: the model must be an encoder, which sees both sides.

One that a teacher can stand beside (`distillation`) has its loss in two parts:
  `outputs(model, batch, info) -> (Outputs, aux)`: what the model says of the batch;
  `loss_of(outputs) -> (loss_sum, weight, metrics)`: what that is worth.

One whose objective changes with what is frozen in the train state, or as training goes on, has
  `given(frozen, progress) -> objective` with `info` and `loss`: asked inside each train step, for
    `state['frozen']` and the shares of (run, stage) that are done at its end, float32 [2];
  `at(progress) -> task`: asked on the host, in floats, between steps: itself, or what is left of it
    from there on. Another task has a compiled step of its own, and the old one is not used again;
  `frozen_cost(batch, seq_len) -> {part: Cost}`: forward passes of frozen models in a train step.
"""

TASKS = {
    'next_token': 'effjax.tasks.next_token:NextToken',
    'masked_lm': 'effjax.tasks.masked_lm:MaskedLM',
    'classification': 'effjax.tasks.classification:Classification',
    'recall': 'effjax.tasks.recall:Recall',
    'distillation': 'effjax.tasks.distillation:Distillation',
}
