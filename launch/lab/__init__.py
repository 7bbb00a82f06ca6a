"""The lab: network namespaces with shaped links, and faults in them."""

from megamoe.launch.lab.namespaces import Host, lab

__all__ = ["Host", "lab"]
