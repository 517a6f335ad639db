// The first level of the tables of addresses: a GiB an entry. See boards/support/src/start.s for who reads them.
//
//   0x00_0000_0000  RAM, with code
//   0x00_4000_0000  RAM of 2 GiB
//   0x00_c000_0000  devices of the Raspberry Pi 4. On a 5 there is RAM here, which the image leaves alone
//   0x10_4000_0000  devices of the Raspberry Pi 5
    .section .data.tables, "aw"
    .balign 4096
    .global table_1
table_1:
    .quad   0x705
    .quad   0x0060000040000705
    .quad   0x0060000080000705
    .quad   0x00600000c0000401
    .fill   61, 8, 0
    .quad   0x0060001040000401
    .fill   445, 8, 0
    .quad   table_2_stacks + 3
