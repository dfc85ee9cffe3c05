"""One point of a sweep -> Plan: resources, placement, budget and warnings, before anything is submitted."""
