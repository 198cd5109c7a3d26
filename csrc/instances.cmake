# The compiled kernels, one line each: nsa_instance(<family> <operation> <dtype> <Dk> <Dv>). A line makes the .cu that
# instantiates the kernel and the row that dispatch finds it by; nothing else lists them.
#
# Block size, G, causality and packing are run-time values.

foreach(operation selected_forward selected_dq selected_dkdv)
  foreach(dtype bfloat16 float16)
    foreach(family sm80 sm90)
      nsa_instance(${family} ${operation} ${dtype} 64 64)
      nsa_instance(${family} ${operation} ${dtype} 128 128)
      nsa_instance(${family} ${operation} ${dtype} 192 128)
      nsa_instance(${family} ${operation} ${dtype} 256 256)
    endforeach()
  endforeach()
endforeach()

foreach(operation range_forward range_dq range_dkdv)
  foreach(dtype bfloat16 float16)
    foreach(family sm80 sm90)
      nsa_instance(${family} ${operation} ${dtype} 64 64)
      nsa_instance(${family} ${operation} ${dtype} 128 128)
      nsa_instance(${family} ${operation} ${dtype} 192 128)
      nsa_instance(${family} ${operation} ${dtype} 256 256)
    endforeach()
  endforeach()
endforeach()

# Dv takes no part; the column repeats Dk.
foreach(dtype bfloat16 float16)
  foreach(family sm80 sm90)
    foreach(dk 64 128 192 256)
      nsa_instance(${family} select_blocks ${dtype} ${dk} ${dk})
    endforeach()
  endforeach()
endforeach()
