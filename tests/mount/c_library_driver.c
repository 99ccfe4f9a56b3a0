/* Calls libttmfs as the lines on standard input say, and answers each with a line of numbers: the result, and what else
 * there is to tell. A page of number N holds the words N * 2^32, N * 2^32 + 1, ...; page 0 is all zeros.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>

#include "ttmfs.h"

enum { MOST = 4096, PAGES_OF_A_THREAD = 300, SHIFT = 24 }; /* SHIFT bytes off a page of memory: requests need care */

static struct ttmfs *backup;

static void make_page(char *page, uint64_t number)
{
	for (size_t word = 0; word < ttmfs_page_size(backup) / 8; word++) {
		uint64_t value = number ? (number << 32) + word : 0;
		memcpy(page + 8 * word, &value, sizeof value);
	}
}

/* Returns the number of a page, -1 if it is torn. */
static long number_of(const char *page)
{
	uint64_t first, value;
	memcpy(&first, page, sizeof first);
	for (size_t word = 0; word < ttmfs_page_size(backup) / 8; word++) {
		memcpy(&value, page + 8 * word, sizeof value);
		if (value != (first ? first + word : 0))
			return -1;
	}
	return (long)(first >> 32);
}

static void store(long idx, long count, long number, int writeback)
{
	size_t size = ttmfs_page_size(backup);
	char *memory = malloc((size_t)count * size + SHIFT);
	for (long i = 0; i < count; i++)
		make_page(memory + SHIFT + (size_t)i * size, (uint64_t)(number ? number + i : 0));
	if (count == 1)
		printf("%ld\n", (long)ttmfs_backup_page(backup, memory + SHIFT, (uint64_t)idx, writeback));
	else
		printf("%ld\n", (long)ttmfs_backup_pages(backup, memory + SHIFT, (size_t)count, (uint64_t)idx, writeback));
	free(memory);
}

static size_t parse(char *text, uint64_t *handles)
{
	size_t count = 0;
	for (char *word = strtok(text, " \n"); word && count < MOST; word = strtok(NULL, " \n"))
		handles[count++] = strtoull(word, NULL, 10);
	return count;
}

static void copy(char *text, int intr)
{
	static uint64_t handles[MOST];
	size_t count = parse(text, handles), size = ttmfs_page_size(backup);
	char *memory = malloc(count * size + SHIFT);
	int error = count == 1 ? ttmfs_copy_page(backup, memory + SHIFT, handles[0], intr)
			       : ttmfs_copy_pages(backup, memory + SHIFT, handles, count, intr);
	printf("%d", error);
	for (size_t i = 0; i < count && !error; i++)
		printf(" %ld", number_of(memory + SHIFT + i * size));
	printf("\n");
	free(memory);
}

static void ignore(int signal)
{
	(void)signal;
}

/* Copies pages while a signal comes every few milliseconds. */
static void interrupt(long milliseconds, char *text)
{
	struct sigaction action = { .sa_handler = ignore };
	struct itimerval timer = { { 0, milliseconds * 1000 }, { 0, milliseconds * 1000 } }, none = { 0 };
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &timer, NULL);
	copy(text, 1);
	setitimer(ITIMER_REAL, &none, NULL);
}

/* Asks for counts and writes back while a signal comes every half millisecond. Answers with the first error, or 0. */
static void look_often(long rounds)
{
	struct sigaction action = { .sa_handler = ignore };
	struct itimerval timer = { { 0, 500 }, { 0, 500 } }, none = { 0 };
	int64_t error = 0;
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &timer, NULL);
	for (long round = 0; round < rounds && error >= 0; round++) {
		error = ttmfs_pages(backup);
		if (error >= 0)
			error = ttmfs_size(backup);
		if (error >= 0)
			error = ttmfs_writeback(backup);
	}
	setitimer(ITIMER_REAL, &none, NULL);
	printf("%ld\n", error < 0 ? (long)error : 0);
}

static void drop(char *text)
{
	static uint64_t handles[MOST];
	size_t count = parse(text, handles);
	printf("%d\n", count == 1 ? ttmfs_drop(backup, handles[0]) : ttmfs_drop_pages(backup, handles, count));
}

struct work {
	pthread_t thread;
	long number, rounds;
	const char *failed;
};

static const char *work_once(uint64_t first, uint64_t number, char *memory)
{
	size_t size = ttmfs_page_size(backup);
	uint64_t handles[PAGES_OF_A_THREAD];
	for (size_t i = 0; i < PAGES_OF_A_THREAD; i++) {
		make_page(memory + i * size, i % 7 ? number + i : 0);
		handles[i] = first + i + 1;
	}
	if (ttmfs_backup_pages(backup, memory, PAGES_OF_A_THREAD, first, 0) != PAGES_OF_A_THREAD)
		return "not all pages were stored";
	memset(memory, 0xEE, PAGES_OF_A_THREAD * size);
	if (ttmfs_copy_pages(backup, memory, handles, PAGES_OF_A_THREAD, 0))
		return "copying failed";
	for (size_t i = 0; i < PAGES_OF_A_THREAD; i++)
		if (number_of(memory + i * size) != (long)(i % 7 ? number + i : 0))
			return "another page came back";
	if (ttmfs_drop(backup, handles[14]) || ttmfs_copy_page(backup, memory, handles[14], 0) != -ENOENT)
		return "a dropped page is there";
	return NULL;
}

static void *work(void *argument)
{
	struct work *job = argument;
	char *memory = malloc(PAGES_OF_A_THREAD * ttmfs_page_size(backup));
	for (long round = 0; round < job->rounds && !job->failed; round++)
		job->failed = work_once((uint64_t)job->number * PAGES_OF_A_THREAD, (uint64_t)(1 + round * 1000), memory);
	free(memory);
	return NULL;
}

static void threads(long count, long rounds)
{
	struct work jobs[16] = { 0 };
	const char *failed = NULL;
	for (long i = 0; i < count; i++) {
		jobs[i] = (struct work){ .number = i, .rounds = rounds };
		pthread_create(&jobs[i].thread, NULL, work, &jobs[i]);
	}
	for (long i = 0; i < count; i++) {
		pthread_join(jobs[i].thread, NULL);
		if (jobs[i].failed)
			failed = jobs[i].failed;
	}
	printf("%s\n", failed ? failed : "0");
}

int main(void)
{
	static char line[1 << 16];
	char path[4096];
	long a, b, c;
	int d;
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "create %4095s %ld %o", path, &a, (unsigned int *)&d) == 3)
			printf("%d\n", ttmfs_create(&backup, path, (uint64_t)a, (mode_t)d));
		else if (sscanf(line, "open %4095s %d", path, &d) == 2)
			printf("%d\n", ttmfs_open(&backup, path, d));
		else if (sscanf(line, "store %ld %ld %ld %d", &a, &b, &c, &d) == 4)
			store(a, b, c, d);
		else if (!strncmp(line, "copy ", 5))
			copy(line + 5, 0);
		else if (sscanf(line, "interrupt %ld %n", &a, &d) == 1)
			interrupt(a, line + d);
		else if (sscanf(line, "descriptors %ld", &a) == 1)
			printf("%d\n", setrlimit(RLIMIT_NOFILE, &(struct rlimit){ (rlim_t)a, 4096 }));
		else if (sscanf(line, "look %ld", &a) == 1)
			look_often(a);
		else if (!strncmp(line, "drop ", 5))
			drop(line + 5);
		else if (sscanf(line, "threads %ld %ld", &a, &b) == 2)
			threads(a, b);
		else if (sscanf(line, "resize %ld", &a) == 1)
			printf("%d\n", ttmfs_resize(backup, (uint64_t)a));
		else if (!strcmp(line, "size\n"))
			printf("%ld\n", (long)ttmfs_size(backup));
		else if (!strcmp(line, "pages\n"))
			printf("%ld\n", (long)ttmfs_pages(backup));
		else if (!strcmp(line, "fd\n"))
			printf("%d\n", ttmfs_fd(backup));
		else if (!strcmp(line, "writeback\n"))
			printf("%d\n", ttmfs_writeback(backup));
		else if (!strcmp(line, "fini\n"))
			printf("%d\n", ttmfs_fini(backup));
		else if (!strcmp(line, "close\n")) {
			ttmfs_close(backup);
			backup = NULL;
			printf("0\n");
		} else
			return 1;
		fflush(stdout);
	}
	ttmfs_close(backup);
	return 0;
}
