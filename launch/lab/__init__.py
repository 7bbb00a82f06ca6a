"""The lab: network namespaces with shaped links, and faults in them."""
