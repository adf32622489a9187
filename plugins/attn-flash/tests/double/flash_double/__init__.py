"""What the doubles of FlashAttention in this folder share."""
