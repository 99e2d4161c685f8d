"""Trace the operands of a logit product to the weight rows of each head, chains of projections, and norms in between.

In: the dataflow of a graph and the logits found in it. Out: attention sites, or refusals with a reason. A backward walk
leads from the operands to the projections; labels that stand for weight rows are then carried forward again.

    labels.py       sets of features as int64 tensors
    views.py        view ops run on labels
    projections.py  products with a weight: which row produces which feature
    flow.py         what is known about one tensor: labels, norms, scale
    rules/          what each kind of op does to features
    trace.py        from an operand back to the projections, and forward again
    trail.py        what the tracer computed, for explanations
    vectors.py      features of an operand at each index of the head dimension
    pairing.py      which query vectors are multiplied with which key vectors
    heads.py        vectors -> heads
    block.py        a weight block under construction
    chains.py       projections before a projection (low rank, MLA)
    values.py       projections behind the values
    roles.py        roles of the blocks of a chain
    blocks.py       heads -> blocks and terms: a site
    uses.py         whether a norm is used for logits only
    basis.py        the nodes that a site was derived from
    join.py         join blocks that are parts of one block
    repeat.py       trace equal layers once
    left_out.py     sites of layers that were not recorded
"""
