// The first level of the tables of addresses: a GiB an entry. See boards/support/src/start.s for who reads them.
//
//   0x0000_0000  two banks of flash, 64 MiB each: Normal, so that vectors can be loaded from them, and read-only; code runs in
//                the first
//   0x0800_0000  devices
//   0x4000_0000  RAM, as much as 15 GiB: Normal, without code
    .section .data.tables, "aw"
    .balign 4096
    .global table_1
table_1:
    .quad   table_2_devices + 3
    .set    gib, 1
    .rept   15
    .quad   (gib << 30) + 0x0060000000000705
    .set    gib, gib + 1
    .endr
    .fill   495, 8, 0
    .quad   table_2_stacks + 3
table_2_devices:
    .set    block, 0
    .rept   32
    .quad   (block << 21) + 0x0040000000000785
    .set    block, block + 1
    .endr
    .rept   32
    .quad   (block << 21) + 0x0060000000000785
    .set    block, block + 1
    .endr
    .rept   448
    .quad   (block << 21) + 0x0060000000000401
    .set    block, block + 1
    .endr
