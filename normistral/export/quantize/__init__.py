"""Weight quantization to 4 or 8 bits, for both formats: RTN, scale search or GPTQ; knows no file format."""
