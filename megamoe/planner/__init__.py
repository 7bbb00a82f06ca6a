"""The planner: does communication hide, which EP size, how many devices; from bandwidth and FLOPs, without a device.

    rule       C / B against 6d / (b_dispatch + b_combine) / f_remote, for each tier of links
    routing    which rank is busiest, and what it has to compute
    schedule   the waves of a layer, played
    layer      how long one expert-parallel layer takes, part by part
    serving    a whole model that serves: memory, prefill, decode, cost
    search     the best of thousands of deployments
    validate   all of that against what was measured

Nothing here imports torch; what is known of devices and models is in megamoe.catalog.
"""
