"""Products and sums of rows that are sorted into groups, one for each expert of a mixture.

products    `linear`, `backward`: each group with a frozen matrix of its own
low_rank    `shrink`, `expand`, `outer`: each group with the factors of its adapter
token_sums  `combine`, `weigh`: the rows of each token, and the gradient of the router's weights
"""
