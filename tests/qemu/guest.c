/* A guest without an operating system, which QEMU starts by Multiboot. It fills MIB of memory with a pattern. Then, in
   rounds, it counts, sums up the pattern, and writes both to the serial port. So each round reads all of the memory, and
   its sum is the same as long as no byte has changed. */

typedef unsigned int u32;

#define MIB 192
#define WORDS (MIB << 18)
#define MEMORY ((u32 *)0x1000000) /* from 16 MiB on: the program lies at 1 MiB, and its stack ends at 8 MiB */
#define SERIAL 0x3f8

__attribute__((section(".text.start"), used)) static const u32 multiboot[] = {0x1BADB002, 0, -(u32)0x1BADB002};

__attribute__((naked)) void start(void) { __asm__("mov $0x800000, %esp\n call run"); }

static void put(char byte) { __asm__ volatile("outb %0, %1" ::"a"(byte), "Nd"((unsigned short)SERIAL)); }

static void print(const char *text) {
    while (*text) put(*text++);
}

static void print_number(u32 number) {
    for (int shift = 28; shift >= 0; shift -= 4) put("0123456789abcdef"[number >> shift & 15]);
}

void run(void) {
    u32 value = 1;
    for (u32 i = 0; i < WORDS; i++) MEMORY[i] = value = value * 1664525 + 1013904223;
    for (u32 round = 1;; round++) {
        u32 sum = 0;
        for (u32 i = 0; i < WORDS; i++) sum = (sum << 5 | sum >> 27) ^ MEMORY[i];
        print("round ");
        print_number(round);
        print(" sum ");
        print_number(sum);
        put('\n');
    }
}
