// From the first instruction to Rust, on every core: down to EL1, floats and SVE on, memory management and caches on.
//
// Rust code may use vector registers anywhere, and vector accesses to memory that is not yet Normal fault on hardware though not
// in QEMU. So none of it runs before the end of this file.

    .section .text.start, "ax"
    .arch_extension sve

// The image's first core. x0 is the address of the device tree, where a loader gives one.
    .global _start
_start:
    // Where nobody holds the other cores back, they come here too, and have to be called later, if anyone can.
    mrs     x1, mpidr_el1
    tst     x1, #0xffffff
    b.ne    park
    mov     x19, x0
    mov     x20, xzr
    b       1f
park:
    wfe
    b       park

// A further core. x0 is its number, as asked for by the call that started it.
    .global start_secondary
start_secondary:
    mov     x19, xzr
    mov     x20, x0

1:  mrs     x21, CurrentEL
    ubfx    x21, x21, #2, #2
    msr     DAIFSet, #15
    cmp     x21, #3
    b.eq    at_el3
    cmp     x21, #2
    b.eq    at_el2
    b       at_el1

at_el3:
    // No traps of calls, AArch64 below: RW, HCE, RES1. EL1 stays secure, since memory that code runs from here need not exist
    // for others (the first flash of QEMU's virt does not), and so there is no EL2 on the way.
    mov     x1, #0x530
    msr     scr_el3, x1
    // No traps of floats; SVE (EZ) where there is one.
    mov     x1, #0x100
    msr     cptr_el3, x1
    isb
    mrs     x1, id_aa64pfr0_el1
    ubfx    x2, x1, #32, #4
    cbz     x2, 2f
    mov     x2, #15
    msr     s3_6_c1_c2_0, x2            // ZCR_EL3: the longest vectors
    isb
2:  mov     x1, #0x3c5
    msr     spsr_el3, x1
    adr     x1, at_el1
    msr     elr_el3, x1
    // What reset leaves unknown and EL1 is entered with.
    ldr     x1, =0x30d00800
    msr     sctlr_el1, x1
    eret

at_el2:
    // EL1 is AArch64 and nothing of it comes here.
    mov     x1, #(1 << 31)
    msr     hcr_el2, x1
    isb
    msr     hstr_el2, xzr
    msr     vttbr_el2, xzr
    msr     cntvoff_el2, xzr
    mov     x1, #3
    msr     cnthctl_el2, x1
    mrs     x1, midr_el1
    msr     vpidr_el2, x1
    mrs     x1, mpidr_el1
    msr     vmpidr_el2, x1
    // All counters of the performance monitors are EL1's.
    mrs     x1, pmcr_el0
    ubfx    x1, x1, #11, #5
    msr     mdcr_el2, x1
    // No traps of floats and SVE: the reserved ones alone.
    mov     x1, #0x32ff
    msr     cptr_el2, x1
    isb
    mrs     x1, id_aa64pfr0_el1
    ubfx    x1, x1, #32, #4
    cbz     x1, 3f
    mov     x1, #15
    msr     s3_4_c1_c2_0, x1            // ZCR_EL2
    isb
3:  ldr     x1, =0x30d00800
    msr     sctlr_el1, x1
    mov     x1, #0x3c5
    msr     spsr_el2, x1
    adr     x1, at_el1
    msr     elr_el2, x1
    isb
    eret

at_el1:
    msr     DAIFSet, #15
    msr     SPSel, #1
    mov     x1, #(3 << 20)
    mrs     x2, id_aa64pfr0_el1
    ubfx    x2, x2, #32, #4
    cbz     x2, 4f
    orr     x1, x1, #(3 << 16)
4:  msr     cpacr_el1, x1
    isb
    cbz     x2, 5f
    mov     x1, #15
    msr     s3_0_c1_c2_0, x1            // ZCR_EL1
    isb
5:  ldr     x1, =vectors
    msr     vbar_el1, x1

    // What is written, but has values, comes from flash, where it is not in its place already. The tables are among it.
    cbnz    x20, 11f
    ldr     x1, =__data_load
    ldr     x2, =__data_start
    ldr     x3, =__data_end
    cmp     x1, x2
    b.eq    11f
10: cmp     x2, x3
    b.hs    11f
    ldp     x4, x5, [x1], #16
    stp     x4, x5, [x2], #16
    b       10b
11: dsb     sy

    // Memory management and caches, by tables that the linker has filled in.
    mov     x1, #0xff04                 // attribute 0: device nGnRE; 1: normal, write-back
    msr     mair_el1, x1
    // 39 bits of address in pages of 4 KiB, tables cached and shared, physical addresses of 40 bits.
    ldr     x1, =({tcr})
    msr     tcr_el1, x1
    ldr     x1, =table_1
    msr     ttbr0_el1, x1
    ic      iallu
    tlbi    vmalle1
    dsb     nsh
    isb
    ldr     x1, =({sctlr})
    msr     sctlr_el1, x1
    isb

    // This core's stack, full of a pattern, by which it is later seen how much of it was used.
    ldr     x1, =({stack_base})
    mov     x2, #{slot}
    madd    x1, x20, x2, x1
    add     x2, x1, x2
    add     x1, x1, #4096
    mov     sp, x2
    ldr     x3, =({pattern})
6:  stp     x3, x3, [x1], #16
    cmp     x1, x2
    b.lo    6b

    cbnz    x20, 8f
    ldr     x1, =__bss_start
    ldr     x2, =__bss_end
7:  cmp     x1, x2
    b.hs    8f
    stp     xzr, xzr, [x1], #16
    b       7b

8:  msr     tpidr_el1, x20
    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x19
    mov     x1, x21
    mov     x2, x20
    cbnz    x20, 9f
    bl      {main}
9:  mov     x0, x20
    bl      {worker}
    b       .
    .ltorg

// Every exception is the end: there is nothing to return to. The report has a stack of its own, since the other may be
// what ran out.
    .macro  vector kind
    .balign 128
    mov     x0, #\kind
    mov     x1, sp
    mov     x2, x30
    ldr     x3, =__exception_stack_end
    mov     sp, x3
    b       {exception}
    .endm

    .section .text.vectors, "ax"
    .balign 2048
vectors:
    vector 0
    vector 1
    vector 2
    vector 3
    vector 4
    vector 5
    vector 6
    vector 7
    vector 8
    vector 9
    vector 10
    vector 11
    vector 12
    vector 13
    vector 14
    vector 15
    .ltorg

// The stacks' pages: a slot for each core, whose first page is nowhere. An overflow of the stack ends there, as an exception.
    .section .data.tables, "aw"
    .balign 4096
    .global table_2_stacks
table_2_stacks:
    .quad   table_3_stacks + 3
    .fill   511, 8, 0
table_3_stacks:
    .set    core, 0
    .rept   {cores}
    .quad   0
    .set    page, 1
    .rept   {slot} / 4096 - 1
    .quad   __stacks + core * {slot} + page * 4096 + 0x0060000000000707
    .set    page, page + 1
    .endr
    .set    core, core + 1
    .endr
    .fill   512 - {cores} * {slot} / 4096, 8, 0
    .section .text, "ax"
