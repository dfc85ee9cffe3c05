"""Plan of one point of a sweep: resources, placement, budget and warnings, before anything is submitted."""
