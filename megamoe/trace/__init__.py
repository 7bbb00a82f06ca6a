"""What happened when: recording runs of the layer, and their events on one time axis."""
