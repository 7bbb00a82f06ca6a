"""Workers on Ray: sessions, placement, actors and their handles."""
