"""Elects the one replica that reconciles, by a `coordination.k8s.io/v1` Lease.

`record`    the Lease as this operator reads and writes it (pure)
`election`  decides who leads, from what one replica sees of the Lease (pure)
`campaign`  reads and renews the Lease, and runs the leader's work for as long as it leads
`fence`     lets writes through for as long as this replica leads
"""
