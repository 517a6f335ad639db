// From a Multiboot loader (32-bit, no paging) to `main` in 64-bit mode with all vector registers switched on.
.section .multiboot, "ax", @progbits
.balign 4
header:
    // Modules begin with a page; where to load this is said here.
    .long 0x1badb002, 0x00010001, -(0x1badb002 + 0x00010001)
    .long header, __load, __data_end, __bss_end, start

.code32
start:
    cli
    mov edi, ebx // where the loader tells what it has loaded: the first argument of `main`
    lea esp, [__stack_top]
    // One gigabyte, mapped to itself in pages of 2 MiB.
    lea eax, [page_directory_pointers]
    or eax, 3
    mov [page_map], eax
    lea eax, [page_directory]
    or eax, 3
    mov [page_directory_pointers], eax
    xor ecx, ecx
1:  mov eax, ecx
    shl eax, 21
    or eax, 0x83
    mov [page_directory + ecx * 8], eax
    inc ecx
    cmp ecx, 512
    jne 1b
    // CR4: OSXSAVE, OSXMMEXCPT, OSFXSR, PAE. EFER: long mode. CR0: paging, coprocessor monitored and not emulated.
    mov eax, cr4
    or eax, 0x40620
    mov cr4, eax
    lea eax, [page_map]
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0xfffffff3
    or eax, 0x80000002
    mov cr0, eax
    lgdt [descriptor_table]
    .byte 0xea // a far jump
    .long start64
    .word 8

.code64
start64:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    // XCR0: x87, SSE, AVX, and the three parts of AVX-512, of those that this CPU has.
    mov eax, 0xd
    xor ecx, ecx
    cpuid
    and eax, 0xe7
    xor edx, edx
    xor ecx, ecx
    xsetbv
    lea rsp, [__stack_top]
    xor ebp, ebp
    mov edi, edi // the upper half may be anything
    call main
2:  hlt
    jmp 2b

.balign 8
descriptors:
    .quad 0, 0x00209a0000000000, 0x0000920000000000
descriptor_table:
    .word 23
    .long descriptors

.section .bss.pages, "aw", @nobits
.balign 4096
page_map: .skip 4096
page_directory_pointers: .skip 4096
page_directory: .skip 4096
.text

// What the compiler calls by name. (rdi, rsi, rdx) by the C calling convention.
.global memcpy, memmove, memset, memcmp, bcmp, strlen
strlen:
    xor eax, eax
    mov rcx, -1
    repne scasb
    not rcx
    lea rax, [rcx - 1]
    ret
memmove:
    mov rax, rdi
    sub rax, rsi
    cmp rax, rdx
    jae memcpy // the destination does not begin inside the source
    mov rax, rdi
    mov rcx, rdx
    lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
memcmp:
bcmp:
    xor eax, eax
    mov rcx, rdx
    cmp rcx, rcx // nothing to compare is alike
    repe cmpsb
    je 3f
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    sub ecx, eax
    mov eax, ecx
3:  ret
