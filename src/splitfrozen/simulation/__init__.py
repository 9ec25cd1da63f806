"""Virtual time: what a method computes and sends, replayed over machines and links."""
